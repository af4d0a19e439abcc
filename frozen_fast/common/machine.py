"""What this machine's processor says of itself."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_information() -> str:
    """Linux's description of the processors; empty where there is none."""
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""


def cpu_model() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    for line in cpu_information().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
