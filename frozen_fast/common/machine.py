"""Processor information."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_information() -> str:
    """The text of /proc/cpuinfo; empty if it does not exist."""
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's model name, or its architecture if the name is unknown."""
    for line in cpu_information().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
