"""Outcome of a trial's process: its cause of failure, or its measurements from the run folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from frozen_fast.common.files import read_json_lines, write_atomically

Cause = Literal["ok", "out_of_memory", "timeout", "nan", "refused", "crash"]

OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate memory|std::bad_alloc|MemoryError|"
    r"cannot allocate memory|NCCL.*out of memory|out of memory at step \d",
    re.IGNORECASE,
)
ERROR_LINE = re.compile(r"error|exception|killed|signal", re.IGNORECASE)
LAUNCHER_LINE = re.compile(
    r"CalledProcessError|ChildFailedError|elastic|simple_launcher|torch\.distributed\.run|^(error_file|traceback)\s*:"
)
NOT_FINITE = re.compile(r"(loss|gradient norm): got -?(nan|inf)|weights: not finite", re.IGNORECASE)
RANK = re.compile(r"^(\[rank\d+\]:)+")
REFUSED = re.compile(r"^error: ", re.MULTILINE)
"""train.py's own line; the launchers turn its exit code 2 into 1."""
KILLED = re.compile(r"died with <Signals\.SIGKILL|Root Cause.*?exitcode\s*:\s*-9\b", re.DOTALL)
"""What the launchers say of a process that was killed, as the kernel does when memory runs out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished trial.

    Attributes:
        trial: the trial's name.
        label: its settings in one line.
        conditions: what it was measured under, as a hash; results of other conditions are not used again.
        rung: the rung of successive halving it ran at, 0 in a plain sweep.
        cause: "ok" or why there are no figures.
        message: the last telling line of a failed trial.
        seconds: wall time of the whole process.
        clips_per_second_per_device: clips over training and stall time of non-warm-up steps, per device.
        gpu_hours_per_epoch: device-hours that one epoch of the sweep's `epoch_clips` would take at that
            speed, a projection.
        peak_memory_bytes: on one device, largest of the run's stages.
        host_memory_bytes: most resident memory that its processes had together, launcher included.
        stall_share: share of training time in which the device waited for input.
        mfu_datasheet: executed FLOPs over the datasheet's peak, None where that is unknown.
    """

    trial: str
    rung: int
    cause: Cause
    conditions: str = ""
    label: str = ""
    message: str = ""
    seconds: float = 0.0
    clips_per_second_per_device: float | None = None
    gpu_hours_per_epoch: float | None = None
    peak_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    stall_share: float | None = None
    mfu_datasheet: float | None = None

    def to_row(self) -> dict[str, Any]:
        """Return a row of results.jsonl as plain values."""
        return asdict(self)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl; a last line that a kill cut short is taken out, so that rows can follow."""
    rows = read_json_lines(path)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def classify(exit_code: int, output: str, *, timed_out: bool, over_memory: bool) -> Cause:
    """The cause behind an exit code and the process's output (its own words, then signals)."""
    if over_memory:
        return "out_of_memory"
    if timed_out:
        return "timeout"
    if exit_code == 0:
        return "ok"
    if OUT_OF_MEMORY.search(output) or exit_code in (-9, 137) or KILLED.search(output):
        return "out_of_memory"
    if NOT_FINITE.search(output):
        return "nan"
    return "refused" if exit_code == 2 or REFUSED.search(output) else "crash"


def telling_line(output: str) -> str:
    """The most informative line of a failed process's output: the script's last error line, otherwise the last line.

    The launchers' own complaints about the script count only where the script said nothing.
    """
    lines = [RANK.sub("", line).strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.search(line)]
    own_errors = [line for line in errors if not LAUNCHER_LINE.search(line)]
    chosen = [line for line in lines if REFUSED.match(line)] or own_errors or errors or lines
    return chosen[-1][:300] if chosen else ""


def read_figures(run_folder: Path, *, epoch_clips: int) -> dict[str, Any]:
    """Speed and memory of a finished run, over all its stages in proportion to their clips, from stages.json.

    Raises:
        ValueError: the run folder has no finished stage with measured (non-warm-up) steps.
    """
    path = run_folder / "stages.json"
    stages = json.loads(path.read_text()) if path.exists() else []
    clips = seconds = stall = used = known = 0.0
    for stage in stages:
        speed = stage["clips_per_second"]
        if speed:
            clips += stage["clips"]
            seconds += stage["clips"] / speed
            stall += stage["stall_share"] * stage["clips"] / speed
            if stage["mfu_datasheet"] is not None:
                used += stage["mfu_datasheet"] * stage["clips"] / speed
                known += stage["clips"] / speed
    if not seconds:
        raise ValueError(f"{path.name}: no measured steps after warm-up")
    devices = stages[-1]["num_devices"]
    return {
        "clips_per_second_per_device": clips / seconds / devices,
        "gpu_hours_per_epoch": epoch_clips * seconds / clips * devices / 3600,
        "peak_memory_bytes": max(stage["peak_memory_bytes"] or 0 for stage in stages) or None,
        "stall_share": stall / seconds,
        "mfu_datasheet": used / known if known else None,
    }
