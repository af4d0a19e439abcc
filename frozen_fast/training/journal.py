"""Records steps: steps.jsonl, the log, the progress bar and experiment trackers.

Losses stay on the device until a window of steps is full (or something needs them), so that a GPU is not stopped to
hear a number. On a CPU every step is written as it ends.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frozen_fast.errors import UserError
from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.tracking import Trackers

log = logging.getLogger(__name__)

_SENT = ("loss", "learning_rate", "stage", "frames", "stall_seconds")
_SHOWN = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MdR", "v2t/R@1", "twin_accuracy", "top1", "top5")


class NotFiniteError(UserError):
    """The loss or the gradient is NaN or infinite; every rank raises it at the same step."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one optimizer step; the meter has its time and clips.

    Attributes:
        loss: the whole batch's loss, on the device, equal on all ranks.
        gradient_norm: before clipping, on the device; None where it was not computed.
        bad_clips: over all ranks, in this step.
    """

    step: int
    stage: int
    frames: int
    source: str
    loss: Tensor
    gradient_norm: Tensor | None
    learning_rate: float
    bad_clips: int


class Journal:
    """Collects steps and writes them in windows."""

    def __init__(
        self,
        folder: RunFolder,
        parallel: Parallel,
        trackers: Trackers,
        *,
        total_steps: int,
        num_stages: int,
        log_every_steps: int,
        advice: str,
    ) -> None:
        """Hold the writers.

        Args:
            folder: where rank 0 writes.
            parallel: ranks and device.
            trackers: experiment trackers; there may be none.
            total_steps: optimizer steps of the whole run.
            num_stages: stages of the whole run.
            log_every_steps: steps between lines of the log; also the length of a window on CUDA.
            advice: what to change when the loss is not finite.
        """
        self._folder, self._parallel, self._trackers = folder, parallel, trackers
        self._total_steps, self._num_stages, self._log_every = total_steps, num_stages, log_every_steps
        self._advice = advice
        self._window = log_every_steps if parallel.device.type == "cuda" else 1
        self._pending: list[StepResult] = []
        self._bar: Any = None

    def add(self, result: StepResult, meter: StageMeter) -> None:
        """Record the step that the meter has just timed; writes when the window is full.

        Raises:
            NotFiniteError: a loss or gradient norm in the window is not finite (rows before it are written).
        """
        self._pending.append(result)
        if len(self._pending) >= self._window:
            self.flush(meter)

    def flush(self, meter: StageMeter) -> None:
        """Write what is pending; waits for the device.

        Raises:
            NotFiniteError: as add().
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        times = meter.end_window()
        values = _read_back([(result.loss, result.gradient_norm) for result in pending])
        rows, failure = [], None
        for result, timing, (loss, norm) in zip(pending, times, values, strict=True):
            if not math.isfinite(loss) or not (norm is None or math.isfinite(norm)):
                failure = self._failure(result, loss, norm)
                break
            rows.append(_row(result, timing, loss, norm))
        if self._parallel.is_main:
            self._folder.append_steps(rows)
            for row in rows:
                self._tell(row)
        if failure is not None:
            raise failure

    def tell_evaluations(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log the numbers of evaluations, and send them on."""
        for row in rows:
            metrics = row["metrics"]
            shown = "  ".join(f"{name} {value:.1f}" for name, value in metrics.items() if name in _SHOWN)
            log.info(
                "evaluation of %s (%s, %d frames): loss %.4f  %s",
                row["source"],
                row["protocol"],
                row["frames"],
                row["loss"],
                shown,
            )
            prefix = f"eval/{row['source']}/{row['protocol']}"
            sent = {**metrics, "loss": row["loss"]}
            self._trackers.log({f"{prefix}/{name}": value for name, value in sent.items()}, row["step"])

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _failure(self, result: StepResult, loss: float, norm: float | None) -> NotFiniteError:
        what = f"loss: got {loss}" if not math.isfinite(loss) else f"gradient norm: got {norm}"
        where = f"step {result.step} (stage {result.stage}, {result.frames} frames, source {result.source})"
        return NotFiniteError(f"{what} at {where}; allowed: finite numbers; {self._advice}")

    def _tell(self, row: dict[str, Any]) -> None:
        rate = row["clips"] / row["seconds"] if row["seconds"] else 0.0
        sent = {f"train/{key}": row[key] for key in _SENT}
        self._trackers.log({**sent, "train/clips_per_second": rate}, row["step"])
        if sys.stderr.isatty():
            self._advance_bar(row, rate)
        elif row["step"] % self._log_every == 0 or row["step"] in (1, self._total_steps):
            log.info(
                "step %d/%d  stage %d/%d  %s %d frames  loss %.4f  lr %.2e  %.1f clips/s  stall %.0f%%",
                row["step"],
                self._total_steps,
                row["stage"] + 1,
                self._num_stages,
                row["source"],
                row["frames"],
                row["loss"],
                row["learning_rate"],
                rate,
                100 * row["stall_seconds"] / max(row["seconds"], 1e-9),
            )

    def _advance_bar(self, row: dict[str, Any], rate: float) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total_steps, initial=row["step"] - 1, unit="step", dynamic_ncols=True)
        self._bar.set_description(f"stage {row['stage'] + 1}/{self._num_stages}, {row['frames']} frames", refresh=False)
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", clips_per_s=f"{rate:.1f}", refresh=False)
        self._bar.update(1)


def _row(result: StepResult, timing: StepTime, loss: float, norm: float | None) -> dict[str, Any]:
    """A line of steps.jsonl."""
    return {
        "step": result.step,
        "stage": result.stage,
        "frames": result.frames,
        "source": result.source,
        "loss": loss,
        "learning_rate": result.learning_rate,
        "gradient_norm": norm,
        "clips": timing.clips,
        "seconds": timing.seconds,
        "stall_seconds": timing.stall_seconds,
        "warmup": timing.warmup,
        "time": time.time(),
        "bad_clips": result.bad_clips,
    }


def _read_back(pairs: list[tuple[Tensor, Tensor | None]]) -> list[tuple[float, float | None]]:
    """Losses and gradient norms as numbers, in one transfer."""
    flat = torch.stack([tensor.float() for pair in pairs for tensor in pair if tensor is not None]).tolist()
    numbers = iter(flat)
    return [(next(numbers), None if norm is None else next(numbers)) for _, norm in pairs]
