"""Wall time of a stage by category, and its GPU-hours.

A stage's wall time is split into training, stall (the device waits for the next batch), warmup (first steps:
compilation, autotuning, filling the loader; their stall included), evaluation, checkpoint, and other (the rest, by
subtraction, so that the parts add up to the wall time). The device is synchronised only at the ends of windows and of
sections: inside a window a step's `seconds` are the host's, and only their sum over a window is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import torch

from frozen_fast.profiling.flops import TrainingFlops
from frozen_fast.profiling.memory import peak_memory_bytes, reset_peak_memory
from frozen_fast.profiling.peak import DevicePeak

# Parts that count as GPU-hours of training; evaluation is counted apart, other is not counted.
CHARGED_PARTS = ("training", "stall", "warmup", "checkpoint")
SECTIONS = ("evaluation", "checkpoint", "warmup")
PARTS = (*CHARGED_PARTS, "evaluation")


class DeviceTimer(Protocol):
    """Marks on the device's own time line."""

    def mark(self) -> Any:
        """A mark after the work queued so far, or None where host time is device time."""

    def seconds_between(self, first: Any, second: Any) -> float | None:
        """Device time between two marks that have both passed; None where host time is device time."""

    def synchronize(self) -> None:
        """Wait until all queued work is done."""


class HostTimer:
    """A device that computes in step with the host (CPU)."""

    def mark(self) -> None:
        """No marks: host time is device time."""

    def seconds_between(self, first: Any, second: Any) -> None:
        """No marks: host time is device time."""

    def synchronize(self) -> None:
        """Nothing is queued."""


class CudaTimer:
    """CUDA events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds_between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Elapsed device time."""
        return first.elapsed_time(second) / 1000.0

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


@dataclass
class StepTime:
    """One optimizer step: `seconds` is wall time with the stall in it; all are final once its window has ended.

    `reading_seconds` and `forward_seconds` are times in which this rank waits for no other one.
    """

    warmup: bool = False
    clips: int = 0
    video_frames: int = 0
    flops: TrainingFlops | None = None
    seconds: float = 0.0
    stall_seconds: float = 0.0
    reading_seconds: float = 0.0
    forward_seconds: float = 0.0
    _clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    _timer: DeviceTimer = field(default_factory=HostTimer, repr=False)
    _ready: Any = field(default=None, repr=False)
    _done: Any = field(default=None, repr=False)
    _forwards: list[tuple[Any, Any]] = field(default_factory=list, repr=False)
    _waits_ahead: list[tuple[float, Any, Any]] = field(default_factory=list, repr=False)

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Wrap the wait for a batch. May be entered once per forward pass of the step."""
        begin = self._clock()
        try:
            yield
        finally:
            self.stall_seconds += self._clock() - begin
            if self._ready is None:
                self._ready = self._timer.mark()

    @contextmanager
    def stall_ahead(self) -> Iterator[None]:
        """Wrap the wait for the next pass's batch while the device computes; it is a stall once the device is idle."""
        begin, first = self._clock(), self._timer.mark()
        yield
        self._waits_ahead.append((self._clock() - begin, first, self._timer.mark()))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wrap this rank's own wait for a batch, inside stall() or stall_ahead()."""
        begin = self._clock()
        try:
            yield
        finally:
            self.reading_seconds += self._clock() - begin

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Wrap what this rank computes of a pass before it waits for other ranks."""
        begin, first = self._clock(), self._timer.mark()
        yield
        if first is None:
            self.forward_seconds += self._clock() - begin
        else:
            self._forwards.append((first, self._timer.mark()))

    def count(self, clips: int, frames: int, flops_per_clip: TrainingFlops | None = None) -> None:
        """Add a forward pass: clips over all ranks, frames of each, and model FLOPs (forward and backward) of one."""
        added = None if flops_per_clip is None else flops_per_clip * clips
        self.flops = _sum(self.flops, added) if self.clips else added
        self.clips += clips
        self.video_frames += clips * frames


class StageMeter:
    """Times one stage on one process (rank 0's is the one that is reported).

    with meter.step(warmup=...) as step:      # the whole optimizer step
        with step.stall():
            batch = next(batches)
        step.count(clips, frames, flops_per_clip)
        ... forward, backward, optimizer ...
    rows = meter.end_window()                 # every few steps: synchronises, returns their StepTimes
    with meter.section("evaluation"): ...     # or "checkpoint", "warmup"
    row = meter.stage_row(...)                # an entry of stages.json

    Args:
        stage: index of the stage, from 0.
        frames: frames per video clip.
        batch_sizes: clips per forward pass over all ranks, by source.
        device: where the model computes.
        num_devices: devices of all ranks (GPU-hours are wall time times this).
        state: state_dict() of an earlier part of the same stage, which this meter continues.
        clock: monotonic seconds, for tests.
        timer: device time line, for tests; none: by the device.
    """

    def __init__(
        self,
        *,
        stage: int,
        frames: int,
        batch_sizes: dict[str, int],
        device: torch.device | str = "cpu",
        num_devices: int = 1,
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        timer: DeviceTimer | None = None,
    ) -> None:
        self.stage, self.frames, self.batch_sizes = stage, frames, dict(batch_sizes)
        self.device, self.num_devices = torch.device(device), num_devices
        self._clock = clock
        self._timer = timer or (CudaTimer(self.device) if self.device.type == "cuda" else HostTimer())
        self._pending: list[StepTime] = []
        self._settled: list[StepTime] = []
        carried = state or {}
        self._seconds = {part: float(carried.get("seconds", {}).get(part, 0.0)) for part in PARTS}
        self._device_seconds = {part: float(carried.get("device_seconds", {}).get(part, 0.0)) for part in PARTS}
        self._wall = float(carried.get("wall_seconds", 0.0))
        self._rank = {"steps": 0, "reading_seconds": 0.0, "forward_seconds": 0.0}
        self._counts = {name: int(carried.get(name, 0)) for name in ("steps", "clips", "video_frames", "timed_clips")}
        self._flops = _carried_flops(carried, "flops")
        self._timed_flops = _carried_flops(carried, "timed_flops")
        self._peak_memory = int(carried.get("peak_memory_bytes", 0))
        reset_peak_memory(self.device)
        self._timer.synchronize()
        self._began = clock()

    @contextmanager
    def step(self, *, warmup: bool = False) -> Iterator[StepTime]:
        """Time one optimizer step; a step that raises is not counted (its time goes to other)."""
        step = StepTime(warmup=warmup, _clock=self._clock, _timer=self._timer)
        begin = self._clock()
        yield step
        step._done = self._timer.mark()
        step.seconds = self._clock() - begin
        self._pending.append(step)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time work outside of steps: evaluation, checkpoint, or warmup (compiling ahead of the first step)."""
        if name not in SECTIONS:
            raise ValueError(f"section: got {name!r}; allowed: {', '.join(SECTIONS)}")
        self._settle()
        begin = self._clock()
        try:
            yield
        finally:
            self._timer.synchronize()
            self._add(name, self._clock() - begin)

    def end_window(self) -> list[StepTime]:
        """Wait for the device and return the steps since the last call, their times final."""
        self._settle()
        steps, self._settled = self._settled, []
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return the totals so far as plain values, for a checkpoint; a meter built with them continues the stage."""
        self._settle()
        return {
            "seconds": dict(self._seconds),
            "device_seconds": dict(self._device_seconds),
            "wall_seconds": self._wall_seconds(),
            **self._counts,
            "flops": None if self._flops is None else astuple(self._flops),
            "timed_flops": None if self._timed_flops is None else astuple(self._timed_flops),
            "peak_memory_bytes": self._memory(),
        }

    def stage_row(
        self,
        *,
        peak: DevicePeak | None = None,
        measured_peak: DevicePeak | None = None,
        recompilations: int = 0,
        joules: float | None = None,
    ) -> dict[str, Any]:
        """The stage's entry of stages.json.

        clips_per_second, stall_share and MFU are of steps after warm-up (null where there is none); gpu_hours hold
        training, stall, warm-up and checkpoints. MFU is of executed FLOPs, null without FLOPs or without the peak.

        Args:
            peak: of the device's datasheet.
            measured_peak: of a matrix product timed on this device.
            recompilations: graphs compiled in the stage.
            joules: energy of the devices.
        """
        self._settle()
        seconds, wall = self._seconds, self._wall_seconds()
        timed = seconds["training"] + seconds["stall"]
        device_seconds = self._device_seconds["training"] + self._device_seconds["stall"]

        def mfu(of: DevicePeak | None) -> float | None:
            if of is None or self._timed_flops is None or not self._timed_flops.executed or not device_seconds:
                return None
            return self._timed_flops.executed / device_seconds / of.flops_per_second

        clips, flops = self._counts["clips"], self._flops
        known = flops is not None and flops.executed > 0 and clips > 0
        charged = sum(self._device_seconds[part] for part in CHARGED_PARTS)
        return {
            "stage": self.stage,
            "frames": self.frames,
            "batch_sizes": self.batch_sizes,
            "steps": self._counts["steps"],
            "clips": self._counts["clips"],
            "video_frames": self._counts["video_frames"],
            "seconds": wall,
            **{f"{part}_seconds": seconds[part] for part in PARTS},
            "other_seconds": max(0.0, wall - sum(seconds.values())),
            "num_devices": self.num_devices,
            "device": self.device.type,
            "gpu_hours": charged / 3600,
            "evaluation_gpu_hours": self._device_seconds["evaluation"] / 3600,
            "clips_per_second": self._counts["timed_clips"] / timed if timed else None,
            "stall_share": seconds["stall"] / timed if timed else None,
            "peak_memory_bytes": self._memory(),
            "flops_per_clip": flops.executed / clips if known and flops is not None else None,
            "nominal_flops_per_clip": flops.nominal / clips if known and flops is not None else None,
            "mfu_datasheet": mfu(peak),
            "mfu_measured_peak": mfu(measured_peak),
            "peak_source": peak.source if peak is not None else None,
            "measured_peak_source": measured_peak.source if measured_peak is not None else None,
            "recompilations": recompilations,
            "joules": joules,
        }

    def rank_row(self) -> dict[str, Any]:
        """This process's own times, of steps after warm-up since it started or resumed the stage.

        steps; reading_seconds: its waits for its loader; forward_seconds: its forward passes, up to the exchange of
        features with other ranks (under zero3 and fsdp2 they hold waits for other ranks' weights too).
        """
        self._settle()
        return dict(self._rank)

    def _settle(self) -> None:
        """Wait for the device and add the pending steps to the totals."""
        begin = self._clock()
        self._timer.synchronize()
        if not self._pending:
            return
        # What the device still had to do belongs to the last step.
        self._pending[-1].seconds += self._clock() - begin
        previous = None
        for step in self._pending:
            waits, step._waits_ahead = step._waits_ahead, []
            ahead = sum(self._idle(*wait) for wait in waits)
            step.stall_seconds = min(self._device_stall(previous, step) + ahead, step.seconds)
            pairs, step._forwards = step._forwards, []
            step.forward_seconds += sum(self._timer.seconds_between(*pair) or 0.0 for pair in pairs)
            self._total(step)
            previous = step
        self._settled += self._pending
        self._pending = []

    def _device_stall(self, previous: StepTime | None, step: StepTime) -> float:
        """Time in which the device had nothing to do before the batch came: at most the host's wait.

        After a synchronisation the device is idle and the host's wait is the stall.
        """
        if previous is None or step._ready is None or previous._done is None:
            return step.stall_seconds
        return self._idle(step.stall_seconds, previous._done, step._ready)

    def _idle(self, waited: float, first: Any, second: Any) -> float:
        """The part of a host's wait in which the device had nothing to do, from the marks around it."""
        idle = self._timer.seconds_between(first, second)
        return waited if idle is None else min(waited, max(0.0, idle))

    def _total(self, step: StepTime) -> None:
        if step.warmup:
            self._add("warmup", step.seconds)
        else:
            self._add("training", step.seconds - step.stall_seconds)
            self._add("stall", step.stall_seconds)
            self._counts["timed_clips"] += step.clips
            self._rank["steps"] += 1
            self._rank["reading_seconds"] += step.reading_seconds
            self._rank["forward_seconds"] += step.forward_seconds
            self._timed_flops = _sum(self._timed_flops, step.flops)
        self._flops = _sum(self._flops, step.flops)
        self._counts["steps"] += 1
        self._counts["clips"] += step.clips
        self._counts["video_frames"] += step.video_frames

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] += seconds
        self._device_seconds[part] += seconds * self.num_devices

    def _wall_seconds(self) -> float:
        return self._wall + self._clock() - self._began

    def _memory(self) -> int:
        return max(self._peak_memory, peak_memory_bytes(self.device))


def _sum(total: TrainingFlops | None, value: TrainingFlops | None) -> TrainingFlops | None:
    """A sum that is unknown once a part of it is."""
    return None if total is None or value is None else total + value


def _carried_flops(carried: Mapping[str, Any], name: str) -> TrainingFlops | None:
    """A total of state_dict(); unknown where an older version wrote one number."""
    value = carried.get(name, (0.0, 0.0))
    return TrainingFlops(*value) if isinstance(value, list | tuple) else None
