"""The checkpoints of a run: their schedule, the state of evaluations, and the best checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from frozen_fast.common.files import read_rows
from frozen_fast.common.secrets import without_secrets
from frozen_fast.config import ExperimentConfig, to_plain
from frozen_fast.data import DataPosition
from frozen_fast.evaluation.metric_table import VALIDATION_LOSS, check_metric, is_better
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.optimizers import WEIGHT_AVERAGE, divergence_advice
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.checkpoint import OptimizerState, RunState, checkpoint_name, save_checkpoint, write_state
from frozen_fast.records.checkpoint_folder import (
    Retention,
    best_checkpoint,
    checkpoints,
    link_best,
    prune,
    restore_best,
)
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.checkpoint_writer import CheckpointWriter, Snapshot, not_saved, total_bytes
from frozen_fast.training.non_finite import NotFiniteError
from frozen_fast.training.stages import OpenStage

log = logging.getLogger(__name__)

AVERAGED = "averaged"
"""Folder in a checkpoint that contains the averaged weights (optimizer.weight_average_decay) as a separate model."""

_POLL_SECONDS = 10.0
_STOP_PATIENCE_SECONDS = 60.0
"""How long a run that was told to stop retries a failing write, instead of checkpoints.give_up_minutes."""


class CheckpointKeeper:
    """Writes a run's checkpoints; all ranks make the same calls, and rank 0 writes.

    Attributes:
        metric: evaluation.keep_best.
        best: {"step", "metric", "value"} of the best evaluation by evaluation.keep_best; None: none yet.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        model: RetrievalModel,
        fingerprints: Mapping[str, str],
        state: RunState | None,
        directions: Mapping[str, bool],
        *,
        roll_backs: int = 0,
    ) -> None:
        """Start, or continue from a checkpoint's state; `directions` says for each metric whether higher is better."""
        self._config, self._parallel, self._folder = config, parallel, folder
        self._model, self._fingerprints, self._roll_backs = model, fingerprints, roll_backs
        self.metric, self._directions = config.evaluation.keep_best, directions
        check_metric(self.metric, directions)
        self._writer, self._snapshot = CheckpointWriter(self._make_room), Snapshot()
        self._saved_seconds = time.monotonic()
        kept = config.checkpoints
        self._retention = Retention(
            newest=kept.keep, every_steps=kept.keep_every_steps, stage_ends=kept.keep_stage_ends
        )
        # A run that resumes from another folder's checkpoint has its own best checkpoint.
        self._last = state if state is not None and self._is_here(state.step) else None
        self.best = None if self._last is None else self._last.best
        if self.best is not None and self.metric not in ("none", self.best["metric"]):
            log.warning(
                "evaluation.keep_best: metric changed to %s; discarding the previous best %s", self.metric, self.best
            )
            self.best = None
        with parallel.together():
            if parallel.is_main:
                restore_best(folder.checkpoints, self.best)
        without_better = self._evaluations_without_better() if parallel.is_main else 0
        self._without_better = parallel.gather_objects(without_better)[0]

    @property
    def out_of_patience(self) -> bool:
        """Whether evaluation.patience evaluations in a row were no better than the best; the same on every rank."""
        patience = self._config.evaluation.patience
        return bool(patience) and self._without_better >= patience

    def _evaluations_without_better(self) -> int:
        """Count the evaluations in metrics.json after the best one, without those before the run was extended."""
        extended = [row.get("step") for row in read_rows(self._folder.events)[0] if row.get("kind") == "extended"]
        known = [step for step in extended if isinstance(step, int)] + ([self.best["step"]] if self.best else [])
        return len({row["step"] for row in self._folder.evaluations() if row["step"] > max(known, default=0)})

    def is_saved(self, step: int) -> bool:
        """Return whether the last checkpoint that this run wrote or resumed from is of this step."""
        return self._last is not None and self._last.step == step

    @property
    def is_due(self) -> bool:
        """Whether checkpoints.every_minutes have passed since the last checkpoint, by rank 0's clock."""
        minutes = self._config.checkpoints.every_minutes
        return bool(minutes) and self._parallel.is_main and time.monotonic() - self._saved_seconds >= 60 * minutes

    def save(
        self,
        stage: OpenStage,
        steps_in_stage: int,
        position: DataPosition,
        *,
        bad_clips: dict[str, Any],
        batch_parts: dict[str, int],
    ) -> None:
        """Take a snapshot and write it in the background.

        The meter's section "checkpoint" is the time for which training pauses: the snapshot, and the wait for an
        earlier checkpoint that is still being written.

        Args:
            stage: the stage that is running.
            steps_in_stage: optimizer steps done in it.
            position: the sources' position.
            bad_clips: the ledger's counts.
            batch_parts: parts of each source's batches (RunState).

        Raises:
            NotFiniteError: the weights are not finite; on every rank.
            UserError: writes have failed for checkpoints.give_up_minutes; on every rank.
        """
        parallel, model = self._parallel, self._model
        began = time.perf_counter()
        with stage.meter.section("checkpoint"):
            if not parallel.state.weights_are_finite():
                raise NotFiniteError(
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
                config=without_secrets(to_plain(self._config)),
                sources=dict(self._fingerprints),
                best=self.best,
                rollbacks=self._roll_backs,
                batch_parts=dict(batch_parts),
            )
            if parallel.is_main:
                self._writer.settle()
            weights, optimizer = parallel.state.weights(), parallel.state.optimizer_state()
            with parallel.together():
                if parallel.is_main:
                    self._writer.check(60 * self._config.checkpoints.give_up_minutes)
                    if not parallel.state.gathers_copies:
                        weights, optimizer = self._snapshot.take(weights, optimizer)
                    self._writer.submit(partial(self._write, state, weights, optimizer, began, time.perf_counter()))
                    if not self._config.checkpoints.asynchronous:
                        self._writer.wait_for_attempt()
        self._saved_seconds = time.monotonic()
        self._restate(state, stage)  # with the time that the snapshot took

    def settle(self) -> None:
        """Wait until the current checkpoint is on disk; every rank calls it."""
        with self._parallel.together():
            if self._parallel.is_main:
                self._writer.wait_for_attempt()
                self._writer.check(60 * self._config.checkpoints.give_up_minutes)

    def finish(self, *, stopped: bool) -> None:
        """Wait for the last checkpoint; every rank calls this before the run's status becomes done or stopped.

        Args:
            stopped: the run was told to stop; failed writes are retried for a minute only.

        Raises:
            UserError: writing failed for checkpoints.give_up_minutes, or for a minute if the run was told to stop.
        """
        parallel = self._parallel
        patience = 60 * self._config.checkpoints.give_up_minutes
        patience = min(patience, _STOP_PATIENCE_SECONDS) if stopped else patience
        deadline = time.monotonic() + patience
        while True:
            written = not parallel.is_main or self._writer.wait(min(_POLL_SECONDS, patience))
            error: Exception | None = None
            if parallel.is_main and not written and self._writer.failure and time.monotonic() >= deadline:
                assert self._last is not None
                error = not_saved(self._last.step, self._writer.failure)
            _, (waiting,) = parallel.agree(error, counts=(int(not written),))
            if not waiting:
                break
        with parallel.together():
            if parallel.is_main:
                self._writer.check(patience)

    def close(self) -> None:
        """Wait for the current write unless it fails; called when a run ends with an error."""
        if self._parallel.is_main:
            self._writer.wait_for_attempt()
            self._writer.close()

    def _write(
        self, state: RunState, weights: dict[str, Tensor], optimizer: OptimizerState, began: float, snapshot: float
    ) -> None:
        """Write one checkpoint, in the writer's thread."""
        folder = self._folder
        path = save_checkpoint(
            folder.checkpoints, state, partial(self._save_models, weights=weights, optimizer=optimizer), optimizer
        )
        if state.best is not None:  # writing the link may have failed before
            best = folder.checkpoints / checkpoint_name(state.best["step"])
            if best.is_dir() and best_checkpoint(folder.checkpoints) != best:
                link_best(folder.checkpoints, state.best["step"])
        prune(folder.checkpoints, self._retention)
        folder.note_checkpoint(state.step)
        log.info(
            "saved %s: training paused for %.2f s, %.2f s to write, snapshot of %.1f MB",
            path,
            snapshot - began,
            time.perf_counter() - snapshot,
            total_bytes(weights, optimizer) / 1e6,
        )

    def _make_room(self) -> bool:
        """Delete the oldest checkpoint that need not be kept, but never the newest; called when the disk is full."""
        newest = checkpoints(self._folder.checkpoints)
        for keep in range(len(newest) - 1, 0, -1):
            prune(self._folder.checkpoints, replace(self._retention, newest=keep))
            for gone in set(newest) - set(checkpoints(self._folder.checkpoints)):
                log.warning(
                    "the disk of %s is full: deleted %s (checkpoints.keep=%d) to make space for a newer checkpoint",
                    self._folder.path,
                    gone.name,
                    self._retention.newest,
                )
                return True
        return False

    def _save_models(self, folder: Path, *, weights: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """Return the trained model, and the average of its weights as a separate model."""
        self._model.save_pretrained(folder, state=weights)
        averages = {name: state[WEIGHT_AVERAGE] for name, state in optimizer.items() if WEIGHT_AVERAGE in state}
        if averages:
            self._model.save_pretrained(folder / AVERAGED, state={**weights, **averages})

    def evaluated(self, stage: OpenStage, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a finished evaluation in the step's checkpoint, if there is one, and keep the best checkpoint.

        Args:
            stage: the stage that is running.
            step: optimizer step of the evaluation.
            rows: rows of metrics.json; the first row's source and protocol decide.
        """
        value = selection_value(self.metric, rows[0])
        best = None if self.best is None else float(self.best["value"])
        better = False
        if self.metric != "none" and value is not None:
            better = is_better(self.metric, value, best, self._directions)
        self._without_better = 0 if better else self._without_better + 1
        if better:
            self.best = {"step": step, "metric": self.metric, "value": value}
        if self._last is None or not self.is_saved(step):
            return
        self._restate(replace(self._last, evaluated=True, best=self.best), stage)
        if better and self._parallel.is_main:
            self._writer.submit(partial(self._link_best, step, value))

    def _link_best(self, step: int, value: float | None) -> None:
        link_best(self._folder.checkpoints, step)
        log.info("best so far by %s (%.4f): step %d", self.metric, value, step)

    def _is_here(self, step: int) -> bool:
        """Whether the run folder has a checkpoint of a step; asks rank 0."""
        found = False
        if self._parallel.is_main:
            found = checkpoint_name(step) in [path.name for path in checkpoints(self._folder.checkpoints)]
        return bool(self._parallel.gather_objects(found)[0])

    def _restate(self, state: RunState, stage: OpenStage) -> None:
        """Rewrite a checkpoint's state with the stage's current totals."""
        self._last = replace(state, meter=stage.totals())
        if self._parallel.is_main:
            path = self._folder.checkpoints / checkpoint_name(state.step)
            self._writer.submit(partial(write_state, path, self._last))


def selection_value(metric: str, row: Mapping[str, Any]) -> float | None:
    """Return the metric of an evaluation that evaluation.keep_best names; None for "none"."""
    if metric == "none":
        return None
    return float(row["loss"] if metric == VALIDATION_LOSS else row["metrics"][metric])
