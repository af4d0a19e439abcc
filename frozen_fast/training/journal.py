"""Records steps: steps.jsonl, the log, the progress bar and experiment trackers.

Losses stay on the device until a window of steps is complete or a value is needed, so that a GPU is not synchronised in
every step. On a CPU every step is written when it ends.
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

from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.tracking import Trackers
from frozen_fast.training.non_finite import NonFiniteSteps, NotFiniteError

log = logging.getLogger(__name__)

_SENT = ("loss", "gradient_norm", "learning_rate", "stage", "frames", "stall_seconds")
_SHOWN = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MdR", "v2t/R@1", "twin_accuracy", "top1", "top5")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one optimizer step; the meter has its time and clips.

    Attributes:
        loss: the whole batch's loss, on the device, equal on all ranks.
        gradient_norm: before clipping, on the device, equal on all ranks.
        bad_clips: over all ranks, in this step.
        clip_ids: this rank's.
    """

    step: int
    stage: int
    frames: int
    source: str
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    bad_clips: int
    clip_ids: Sequence[str]


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
        non_finite: NonFiniteSteps,
    ) -> None:
        """Initialise the journal.

        Args:
            folder: the run folder, which rank 0 writes.
            parallel: ranks and device.
            trackers: experiment trackers; may be empty.
            total_steps: optimizer steps of the whole run.
            num_stages: stages of the whole run.
            log_every_steps: steps between lines of the log; also the length of a window on CUDA.
            non_finite: applied to each step.
        """
        self._folder, self._parallel, self._trackers = folder, parallel, trackers
        self._total_steps, self._num_stages, self._log_every = total_steps, num_stages, log_every_steps
        self._non_finite = non_finite
        self._window = log_every_steps if parallel.device.type == "cuda" else 1
        self._pending: list[StepResult] = []
        self._bar: Any = None

    def add(self, result: StepResult, meter: StageMeter) -> None:
        """Record the step that the meter has just timed; writes if the window is complete.

        Raises:
            NotFiniteError: as NonFiniteSteps.is_skipped, for a step of the window (rows before it are written).
        """
        self._pending.append(result)
        if len(self._pending) >= self._window:
            self.flush(meter)

    def flush(self, meter: StageMeter) -> None:
        """Write pending steps; waits for the device.

        Raises:
            NotFiniteError: as add().
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        times = meter.end_window()
        values = _read_back([(result.loss, result.gradient_norm) for result in pending])
        rows: list[dict[str, Any]] = []
        failure: NotFiniteError | None = None
        for result, timing, (loss, norm) in zip(pending, times, values, strict=True):
            where: dict[str, Any] = {
                "step": result.step,
                "stage": result.stage,
                "frames": result.frames,
                "source": result.source,
            }
            try:
                skipped = self._non_finite.is_skipped(loss, norm, **where, clip_ids=result.clip_ids)
            except NotFiniteError as error:
                failure = error
                break
            numbers = {"loss": _finite(loss), "learning_rate": result.learning_rate, "gradient_norm": _finite(norm)}
            rows.append({**where, **numbers, **_times(timing), "bad_clips": result.bad_clips, "skipped": skipped})
        if self._parallel.is_main:
            self._folder.append_steps(rows)
            for row in rows:
                self._tell(row)
        if failure is not None:
            raise failure

    def tell_evaluations(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log evaluations, and send them to the trackers."""
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

    def _tell(self, row: dict[str, Any]) -> None:
        rate = row["clips"] / row["seconds"] if row["seconds"] else 0.0
        sent = {f"train/{key}": row[key] for key in _SENT}
        self._trackers.log({**sent, "train/clips_per_second": rate}, row["step"])
        if sys.stderr.isatty():
            self._advance_bar(row, rate)
        elif row["step"] % self._log_every == 0 or row["step"] in (1, self._total_steps):
            log.info(
                "step %d/%d  stage %d/%d  %s %d frames  loss %s  lr %.2e  %.1f clips/s  stall %.0f%%",
                row["step"],
                self._total_steps,
                row["stage"] + 1,
                self._num_stages,
                row["source"],
                row["frames"],
                _shown(row["loss"]),
                row["learning_rate"],
                rate,
                100 * row["stall_seconds"] / max(row["seconds"], 1e-9),
            )

    def _advance_bar(self, row: dict[str, Any], rate: float) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total_steps, initial=row["step"] - 1, unit="step", dynamic_ncols=True)
        self._bar.set_description(f"stage {row['stage'] + 1}/{self._num_stages}, {row['frames']} frames", refresh=False)
        self._bar.set_postfix(loss=_shown(row["loss"]), clips_per_s=f"{rate:.1f}", refresh=False)
        self._bar.update(1)


def _times(timing: StepTime) -> dict[str, Any]:
    """Return the meter's part of a line of steps.jsonl."""
    return {
        "clips": timing.clips,
        "seconds": timing.seconds,
        "stall_seconds": timing.stall_seconds,
        "warmup": timing.warmup,
        "time": time.time(),
    }


def _shown(loss: float | None) -> str:
    """Format a loss for the log."""
    return "not finite" if loss is None else f"{loss:.4f}"


def _finite(value: float) -> float | None:
    """Convert a number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _read_back(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Read losses and gradient norms from the device in one transfer."""
    flat = torch.stack([tensor.float() for pair in pairs for tensor in pair]).tolist()
    return list(zip(flat[::2], flat[1::2], strict=True))
