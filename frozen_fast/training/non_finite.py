"""Steps whose loss or gradient is NaN or infinite: their record, and training.on_non_finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from frozen_fast.config.schema import TrainingConfig
from frozen_fast.errors import UserError
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.run_folder import RunFolder

log = logging.getLogger(__name__)


class NotFiniteError(UserError):
    """A loss, a gradient or the weights are NaN or infinite; every rank raises it at the same step."""


class NonFiniteSteps:
    """Applies training.on_non_finite to the steps of a run, in order; all ranks make the same calls."""

    def __init__(self, training: TrainingConfig, folder: RunFolder, parallel: Parallel, advice: str) -> None:
        """Initialise; `advice` names the keys to change."""
        self._training, self._folder, self._parallel, self._advice = training, folder, parallel, advice
        self._in_a_row = 0

    def is_skipped(
        self,
        loss: float,
        norm: float,
        *,
        step: int,
        stage: int,
        frames: int,
        source: str,
        clip_ids: Sequence[str],
    ) -> bool:
        """Return whether a step was skipped, after recording a step that is not finite; a collective for such steps.

        Args:
            loss: loss of the whole batch, equal on all ranks.
            norm: norm of the gradient, equal on all ranks.
            step: optimizer step, from 1.
            stage: index of its stage.
            frames: frames per clip.
            source: source of the step's clips.
            clip_ids: this rank's clips.

        Raises:
            NotFiniteError: the step is not finite, and the policy is not skip, or too many were skipped in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return False
        action = self._training.on_non_finite
        clips_of_ranks = self._parallel.gather_objects(list(clip_ids))
        if self._parallel.is_main:
            values = {"loss": repr(loss), "gradient_norm": repr(norm), "action": action}
            where = {"step": step, "stage": stage, "frames": frames, "source": source}
            self._folder.append_non_finite([{**where, **values, "clip_ids": sum(clips_of_ranks, [])}])
        what = f"loss: got {loss}" if not math.isfinite(loss) else f"gradient norm: got {norm}"
        told = f"{what} at step {step} (stage {stage}, {frames} frames, source {source})"
        self._in_a_row += 1
        if action == "skip" and self._in_a_row <= self._training.max_skips:
            log.warning("%s: the update is skipped on every rank; its clips are in non_finite.jsonl", told)
            return True
        if action == "skip":
            told += f", after {self._training.max_skips} skipped steps in a row (training.max_skips)"
        raise NotFiniteError(f"{told}; its clips are in non_finite.jsonl; allowed: finite numbers; {self._advice}")
