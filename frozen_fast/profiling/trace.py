"""torch.profiler over a few steps of each stage: a Chrome trace, and the most expensive kernels as a table."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from frozen_fast.common.files import write_json

log = logging.getLogger(__name__)

_TOP = 20
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_COPIES = ("Memcpy", "Memset")


class StageTrace:
    """Traces some steps of one stage after the warm-up steps."""

    def __init__(self, folder: Path, stage: int, *, first: int, steps: int, device: torch.device) -> None:
        """Plan a trace.

        Args:
            folder: where stage_N.trace.json and stage_N.kernels.json go.
            stage: index of the stage.
            first: the first step of the stage to trace, from 0.
            steps: how many, 0: none.
            device: on CUDA kernels are traced too.
        """
        self._folder, self._stage, self._first, self._steps, self._device = folder, stage, first, steps, device
        self._profiler: Any = None
        self._traced = 0
        self._began = 0.0

    def before_step(self, index: int) -> None:
        """Tell that step `index` of the stage begins."""
        if self._steps and index == self._first:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.start()
            self._began = time.perf_counter()

    def after_step(self, index: int) -> None:
        """Tell that step `index` of the stage has ended."""
        if self._profiler is not None:
            self._traced += 1
            if index + 1 >= self._first + self._steps:
                self.close()

    def close(self) -> None:
        """Write what was traced; also when the stage ends early. A disk that refuses it is a warning."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        seconds = time.perf_counter() - self._began
        profiler.stop()
        try:
            self._write(profiler, seconds)
        except (OSError, RuntimeError) as error:  # Kineto raises RuntimeErrors
            log.warning("the trace of stage %d could not be written: %s", self._stage, error)

    def _write(self, profiler: Any, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"stage_{self._stage}.trace.json"
        profiler.export_chrome_trace(str(path))
        what = "kernel" if self._device.type == "cuda" else "operator"
        rows, total = most_expensive(profiler.key_averages(), on_cuda=self._device.type == "cuda")
        table = {"stage": self._stage, "what": what, "steps": self._traced, "total_milliseconds": total, "rows": rows}
        table["use"] = device_use(profiler.events(), steps=self._traced, seconds=seconds)
        write_json(self._folder / f"stage_{self._stage}.kernels.json", table)
        log.info("wrote a trace of stage %d: %s", self._stage, path)


def device_use(events: Iterable[Any], *, steps: int, seconds: float) -> dict[str, float | None]:
    """How host and device spent the traced steps; what the device did is None where it was not traced.

    Args:
        events: torch.profiler's events().
        steps: traced.
        seconds: wall time of the steps as the host saw it.

    Returns:
        Per step: host_milliseconds (wall time without waiting for the device), launches (kernels and graphs that the
        host launched), busy_milliseconds (a kernel runs), copy_milliseconds (copies and fills, beside kernels or not).
        And idle_share: of the time from the first kernel or copy to the last, in which neither runs.
    """
    launches, waited = 0, 0.0
    kernels: list[tuple[float, float]] = []
    copies: list[tuple[float, float]] = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            (copies if event.name.startswith(_COPIES) else kernels).append(span)
        elif event.name.startswith(_LAUNCHES):
            launches += 1
        elif event.name.startswith(_WAITS):
            waited += span[1] - span[0]
    row: dict[str, float | None] = {"host_milliseconds": (1000 * seconds - waited / 1000) / max(1, steps)}
    if not kernels:
        return row | dict.fromkeys(("launches", "busy_milliseconds", "copy_milliseconds", "idle_share"))
    both = kernels + copies
    window = max(end for _, end in both) - min(start for start, _ in both)
    return row | {
        "launches": launches / steps,
        "busy_milliseconds": _covered(kernels) / 1000 / steps,
        "copy_milliseconds": _covered(copies) / 1000 / steps,
        "idle_share": 1 - _covered(both) / window if window else 0.0,
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """The time in which at least one of some spans runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def most_expensive(averages: Iterable[Any], *, on_cuda: bool) -> tuple[list[dict[str, Any]], float]:
    """The kernels with the most time of their own, and the total time.

    Args:
        averages: entries of torch.profiler's key_averages().
        on_cuda: count kernels on the device; otherwise operators on the CPU, each without those that it calls.

    Returns:
        (rows of {"name", "calls", "milliseconds", "share" of the total}, most first; the total in milliseconds).
    """
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    times = [
        (float(entry.self_device_time_total if on_cuda else entry.self_cpu_time_total) / 1000, entry)
        for entry in averages
        if entry.device_type == kind and not entry.is_user_annotation
    ]
    total = sum(milliseconds for milliseconds, _ in times)
    times.sort(key=lambda item: (-item[0], item[1].key))
    rows = [
        {"name": entry.key, "calls": entry.count, "milliseconds": time, "share": time / total}
        for time, entry in times[:_TOP]
        if time > 0
    ]
    return rows, total
