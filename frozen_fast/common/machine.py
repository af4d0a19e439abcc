"""Processor information."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_information() -> str:
    """The text of /proc/cpuinfo; empty if it does not exist."""
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""


def cpu_model() -> str:
    """The processor's model name, or its architecture if the name is unknown."""
    for line in cpu_information().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
