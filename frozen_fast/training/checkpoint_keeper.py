"""When a run's checkpoints are written, what they say of its evaluations, and which of them is the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from frozen_fast.config import ExperimentConfig, to_plain
from frozen_fast.data import DataPosition
from frozen_fast.errors import UserError
from frozen_fast.evaluation.metric_table import VALIDATION_LOSS, check_metric, is_better
from frozen_fast.models import DualEncoder
from frozen_fast.optimizers import divergence_advice
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.checkpoint import (
    RunState,
    checkpoint_name,
    checkpoints,
    link_best,
    restore_best,
    save_checkpoint,
    write_state,
)
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.stages import OpenStage

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes a run's checkpoints; every rank calls it alike, rank 0 writes.

    Attributes:
        best: {"step", "metric", "value"} of the best evaluation so far under evaluation.keep_best; None: none yet.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        model: DualEncoder,
        fingerprints: Mapping[str, str],
        state: RunState | None,
    ) -> None:
        """Go on from a checkpoint's state, or begin."""
        self._config, self._parallel, self._folder = config, parallel, folder
        self._model, self._fingerprints = model, fingerprints
        self._metric = config.evaluation.keep_best
        check_metric(self._metric, config.evaluation.metrics)
        # A run that goes on from another folder's checkpoint has a best of its own.
        self._last = state if state is not None and self._is_here(state.step) else None
        self.best = None if self._last is None else self._last.best
        if self.best is not None and self._metric not in ("none", self.best["metric"]):
            log.warning(
                "evaluation.keep_best: metric changed to %s; discarding the previous best %s", self._metric, self.best
            )
            self.best = None
        with parallel.together():
            if parallel.is_main:
                restore_best(folder.checkpoints, self.best)

    def is_saved(self, step: int) -> bool:
        """Whether the last checkpoint that this run wrote or went on from is of this step."""
        return self._last is not None and self._last.step == step

    def save(self, stage: OpenStage, steps_in_stage: int, position: DataPosition, bad_clips: dict[str, Any]) -> None:
        """Write a checkpoint; refuses weights that are not finite, so that the last good one stays the newest.

        Args:
            stage: the stage that is running.
            steps_in_stage: optimizer steps done in it.
            position: how far the sources have been read.
            bad_clips: the ledger's counts.

        Raises:
            UserError: the weights are not finite, or the disk refuses; on every rank.
        """
        parallel, model = self._parallel, self._model
        with stage.meter.section("checkpoint"):
            if not parallel.weights_are_finite():
                raise UserError(
                    f"weights: not finite after step {position.step}; no checkpoint was written and the last one is "
                    f"good; {divergence_advice(self._config.optimizer)}"
                )
            state = RunState(
                step=position.step,
                stage=stage.plan.index,
                steps_in_stage=steps_in_stage,
                stage_complete=steps_in_stage == stage.plan.steps,
                position=position.to_json(),
                meter=stage.totals(),
                bad_clips=bad_clips,
                learned_frames=model.learned_frames,
                world_size=parallel.world_size,
                config=to_plain(self._config),
                sources=dict(self._fingerprints),
                best=self.best,
            )
            weights, optimizer = parallel.weights(), parallel.optimizer_state()
            with parallel.together():
                if parallel.is_main:
                    write = partial(model.save_pretrained, state=weights)
                    keep = self._config.checkpoints.keep
                    path = save_checkpoint(self._folder.checkpoints, state, write, optimizer, keep=keep)
                    self._folder.write_status("running", step=position.step, stage=stage.plan.index)
                    log.info("saved %s", path)
        self._restate(state, stage)  # with the time that writing took

    def evaluated(self, stage: OpenStage, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note in the step's checkpoint, if it has one, that its evaluation is done, and keep the best.

        Args:
            stage: the stage that is running.
            step: optimizer step of the evaluation.
            rows: of metrics.json; the first one's source and protocol decide.
        """
        value = selection_value(self._metric, rows[0])
        best = None if self.best is None else float(self.best["value"])
        better = False
        if self._metric != "none" and value is not None:
            better = is_better(self._metric, value, best, self._config.evaluation.metrics)
        if better:
            self.best = {"step": step, "metric": self._metric, "value": value}
        if self._last is None or not self.is_saved(step):
            return
        self._restate(replace(self._last, evaluated=True, best=self.best), stage)
        with self._parallel.together():
            if better and self._parallel.is_main:
                link_best(self._folder.checkpoints, step)
                log.info("best so far by %s (%.4f): step %d", self._metric, value, step)

    def _is_here(self, step: int) -> bool:
        """Whether the run folder has a checkpoint of a step; asks rank 0."""
        found = False
        if self._parallel.is_main:
            found = checkpoint_name(step) in [path.name for path in checkpoints(self._folder.checkpoints)]
        return bool(self._parallel.gather_objects(found)[0])

    def _restate(self, state: RunState, stage: OpenStage) -> None:
        """Write a checkpoint's state again, with the stage's totals as they are now."""
        self._last = replace(state, meter=stage.totals())
        with self._parallel.together():
            if self._parallel.is_main:
                path = self._folder.checkpoints / checkpoint_name(state.step)
                try:
                    write_state(path, self._last)
                except OSError as error:
                    raise UserError(f"run_folder: could not write {path / 'state.json'} ({error})") from error


def selection_value(metric: str, row: Mapping[str, Any]) -> float | None:
    """The number of an evaluation that evaluation.keep_best looks at; None for "none"."""
    if metric == "none":
        return None
    return float(row["loss"] if metric == VALIDATION_LOSS else row["metrics"][metric])
