"""What the benchmarks share: timing windows, peak memory of a step, the machine's description, result files.

Timings never include the first runs; a device is synchronised at the ends of a window only.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from frozen_fast.common.files import write_json
from frozen_fast.common.machine import available_cores, cpu_information, cpu_model
from frozen_fast.profiling import measure_peak

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "xformers", "timm", "transformers", "accelerate", "numpy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Seconds of one step over several windows."""

    median: float
    p20: float
    p80: float
    windows: int
    steps_per_window: int


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summarize(seconds: Sequence[float], steps: int = 1) -> Timing:
    """Median, p20 and p80 of seconds per step."""
    return Timing(statistics.median(seconds), percentile(seconds, 0.2), percentile(seconds, 0.8), len(seconds), steps)


def time_window(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Seconds per step of one window of this number of steps, synchronised at both ends."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def cause(error: Exception) -> str:
    """Why something failed, in one line: the exception's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def time_in_turns(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    windows: int = 7,
    window_seconds: float = 0.05,
    warmup: int = 2,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time several steps in alternation, one window each, so that other load on the machine affects all of them.

    A step that raises is a result too: its cause is returned and it is not run again. Every exception counts, since
    Triton's own derive from Exception alone.

    Args:
        steps: what to time, by name.
        device: where it runs.
        windows: windows per step.
        window_seconds: a window holds as many runs as fill about this time, at least one.
        warmup: runs of each step before anything is timed.

    Returns:
        The timings of the steps that ran, and the cause of each that failed.
    """
    counts: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}

    def run(name: str, window: int) -> None:
        if window == 0:
            for _ in range(warmup):
                steps[name]()
            counts[name] = max(1, round(window_seconds / max(time_window(steps[name], device, 1), 1e-9)))
        else:
            seconds[name].append(time_window(steps[name], device, counts[name]))

    for window in range(1 + windows):
        for name in steps:
            if name in failed:
                continue
            try:
                run(name, window)
            except Exception as error:
                failed[name] = cause(error)
    timings = {name: summarize(seconds[name], counts[name]) for name in steps if name not in failed}
    return timings, failed


def peak_step_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that one step holds at once, beyond what was there before it.

    On CUDA from the allocator; on a CPU from the profiler's record of every allocation.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, CPU, threads and library versions, for a result file; no host name and no paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "device_type": device.type,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": " amx_bf16" in cpu_information(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where tracked files differ; none outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def measured_peak(device: torch.device, dtype: str) -> dict[str, Any]:
    """This machine's own matrix-product peak and copy bandwidth, measured now."""
    return asdict(measure_peak(device, dtype))


def pick_device(name: str) -> torch.device:
    """A device by name; auto: CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def write_result(path: Path, device: torch.device, options: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a result file: the command, its options, the machine, and the result's own keys.

    Only the last part of absolute paths is kept, because results are published.
    """
    command = ["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]
    settings = {key: value.name if isinstance(value, Path) else value for key, value in options.items()}
    write_json(path, {"command": command, "options": settings, "machine": describe_machine(device), **result})
