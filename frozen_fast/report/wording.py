"""Shared phrases of the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from frozen_fast.report.run_data import RunData


def devices(run: RunData) -> str:
    """The run's devices, equal ones counted."""
    names = Counter(str(name) for name in run.environment.get("devices", []))
    return " and ".join(f"{n} x {name}" if n > 1 else name for name, n in names.items()) or "unknown devices"


def hours_name(run: RunData) -> str:
    """Name of device-hours: GPU-hours on GPUs."""
    return "GPU-hours" if run.on_gpu or not run.stages else "CPU process-hours"


def after_text(run: RunData, row: dict[str, Any]) -> str:
    """When an evaluation was made: after a stage, or after which step of it where there are several."""
    best = " (best)" if row["step"] == run.best_step else ""
    inside = f", step {row['step']:,}" if run.evaluates_inside_stages() else ""
    return f"stage {row['stage'] + 1}{inside}{best}"


def frames_text(frames: int) -> str:
    """A number of frames with its noun."""
    return f"{frames} frame" + ("" if frames == 1 else "s")
