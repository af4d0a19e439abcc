"""torch.profiler over a few steps of each stage: a Chrome trace and the most expensive operators."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from frozen_fast.common.files import write_atomically

log = logging.getLogger(__name__)

_TOP_OPERATORS = 30


class StageTrace:
    """Traces some steps of one stage after the warm-up steps."""

    def __init__(self, folder: Path, stage: int, *, first: int, steps: int, device: torch.device) -> None:
        """Plan a trace.

        Args:
            folder: where stage_N.trace.json and stage_N.operators.txt go.
            stage: index of the stage.
            first: the first step of the stage to trace, from 0.
            steps: how many, 0: none.
            device: on CUDA kernels are traced too.
        """
        self._folder, self._stage, self._first, self._steps, self._device = folder, stage, first, steps, device
        self._profiler: Any = None

    def before_step(self, index: int) -> None:
        """Tell that step `index` of the stage begins."""
        if self._steps and index == self._first:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.start()

    def after_step(self, index: int) -> None:
        """Tell that step `index` of the stage has ended."""
        if self._profiler is not None and index + 1 >= self._first + self._steps:
            self.close()

    def close(self) -> None:
        """Write what was traced; also when the stage ends early."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"stage_{self._stage}.trace.json"
        profiler.export_chrome_trace(str(path))
        sort_by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort_by, row_limit=_TOP_OPERATORS)
        write_atomically(self._folder / f"stage_{self._stage}.operators.txt", table + "\n")
        log.info("traced stage %d: %s", self._stage, path)
