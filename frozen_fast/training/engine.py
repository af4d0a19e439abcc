"""The training loop: stages, steps, checkpoints and evaluations, in one process per device."""

from __future__ import annotations

import logging

from frozen_fast.config import ExperimentConfig, StagePlan
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.running_statistics import average_running_statistics
from frozen_fast.profiling.meter import StageMeter
from frozen_fast.profiling.trace import StageTrace
from frozen_fast.records.checkpoint import RunState
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training import compiling
from frozen_fast.training.batch_feed import BatchFeed, StepGivenUp
from frozen_fast.training.checkpoint_keeper import CheckpointKeeper
from frozen_fast.training.journal import Journal
from frozen_fast.training.optimizer_step import OptimizerStep
from frozen_fast.training.run_parts import RunParts
from frozen_fast.training.signals import StopRequest
from frozen_fast.training.stage_energy import StageEnergy
from frozen_fast.training.stage_evaluation import StageEvaluation
from frozen_fast.training.stages import OpenStage, describe_plan, expand_frames, warm_up_steps

log = logging.getLogger(__name__)


class Engine:
    """Runs the stages of an experiment from the run's current state.

    Attributes:
        stage: index of the stage that is running.
        keeper: the run's checkpoints.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        parts: RunParts,
        journal: Journal,
        stop: StopRequest,
        state: RunState | None,
    ) -> None:
        """Initialise; `state` is that of the checkpoint to resume from."""
        self._config, self._parallel, self._folder, self._parts = config, parallel, folder, parts
        self._journal = journal
        self.stage = 0 if state is None else state.stage
        self.keeper = CheckpointKeeper(
            config,
            parallel,
            folder,
            parts.model,
            parts.fingerprints,
            state,
            parts.task.directions(),
            roll_backs=parts.roll_backs,
        )
        self._feed = BatchFeed(config, parallel, folder, parts, stop, state, lambda: self.keeper.is_due)
        self._optimizer_step = OptimizerStep(config, parallel, folder, parts, self._feed, journal)
        self._evaluation = StageEvaluation(
            config, parallel, folder, parts.task, parts.evaluation_sources, len(parts.plans), journal, stop
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self._feed.position.step

    def run(self, state: RunState | None, *, closed_stages: int = 0) -> bool:
        """Run all remaining stages.

        Args:
            state: state of the checkpoint to resume from; None: start at the first step.
            closed_stages: stages whose evaluation and row have been written.

        Returns:
            True if the run is complete, False if it was told to stop (after saving a checkpoint).

        Raises:
            UserError: bad clips past their share, a loss that is not finite, a mistake in the data; on every rank.
        """
        for plan in self._parts.plans:
            if plan.index < closed_stages:
                continue
            if self.keeper.out_of_patience:
                break
            here = state if state is not None and state.stage == plan.index else None
            if not self._run_stage(plan, here):
                return False
        self._feed.ledger.check(final=True)
        return True

    def _run_stage(self, plan: StagePlan, state: RunState | None) -> bool:
        """Run a stage, or the rest of it after a checkpoint's state; False if told to stop (after saving)."""
        config, parallel, model = self._config, self._parallel, self._parts.model
        self.stage = plan.index
        done = 0 if state is None else state.steps_in_stage
        meter = StageMeter(
            stage=plan.index,
            frames=plan.frames,
            batch_sizes=plan.batch_sizes,
            device=parallel.device,
            num_devices=parallel.world_size,
            state=None if state is None else state.meter,
        )
        carried = 0.0 if state is None else state.meter.get("joules")
        stage = OpenStage(plan, meter, StageEnergy(parallel, self._parts.energy, carried))
        self._optimizer_step.batch_parts.begin_stage(state)
        log.info("stage %d/%d: %s", plan.index + 1, len(self._parts.plans), describe_plan(plan))
        self.keeper.settle()  # what is being written tells of the model's frames
        with meter.section("warmup"):
            expand_frames(parallel, model, plan.frames, config.model.expansion)
            sizes = {frames: plan.micro_batch_sizes[name] for name, frames in plan.source_frames.items()}
            compiling.begin_stage(
                model,
                sizes,
                device=parallel.device,
                precision=parallel.precision,
                compiled=config.training.compile,
            )
        graphs = compiling.compiled_graphs()
        if done < plan.steps:
            if state is not None and not state.evaluated and not self._evaluate_inside(stage, done):
                return False
            if not self._run_steps(stage, done):
                return False
            if not self.keeper.out_of_patience:
                self._save(stage, plan.steps)
        due = not self.keeper.out_of_patience and self._evaluation.is_due(plan, plan.steps)
        if due and not self._evaluate(stage, plan.steps):
            return False
        graphs = compiling.compiled_graphs() - graphs
        joules = stage.energy.joules()
        ranks = parallel.gather_objects(meter.rank_row())
        with parallel.together():
            if parallel.is_main:
                peaks = {"peak": self._parts.peak, "measured_peak": self._parts.measured_peak}
                row = meter.stage_row(**peaks, recompilations=graphs, joules=joules)
                row["ranks"] = ranks if parallel.world_size > 1 else []
                self._folder.put_stage_row(row)
                kernels = model.kernels_used(parallel.device, compiled=config.training.compile)
                decoders = {name: dict(counts) for name, counts in self._feed.decode_backends.items()}
                self._folder.update_environment(decode_backends=decoders, **kernels)
        return True

    def _run_steps(self, stage: OpenStage, done: int) -> bool:
        """Run the stage's remaining steps; False if told to stop (after saving)."""
        config, parallel, plan, feed = self._config, self._parallel, stage.plan, self._feed
        batches = feed.batches(plan, done)
        warm_up = done + warm_up_steps(plan.steps, sum(source.weight > 0 for source in config.data.sources))
        trace = StageTrace(
            self._folder.traces,
            plan.index,
            first=warm_up,
            steps=config.training.profile_steps if parallel.is_main else 0,
            device=parallel.device,
        )
        every = config.checkpoints.every_steps
        try:
            for index in range(done, plan.steps):
                if self.keeper.out_of_patience:
                    log.info("early stopping: no better %s for evaluation.patience evaluations", self.keeper.metric)
                    break
                trace.before_step(index)
                try:
                    with self._parts.watchdog.phase("first_step" if index == done else "step"):
                        self._optimizer_step.run(stage, batches, warmup=index < warm_up)
                except StepGivenUp:
                    if not self.keeper.is_saved(self.step):
                        self._save(stage, index)
                    return False
                trace.after_step(index)
                inside = index + 1 < plan.steps
                if feed.stopped or (inside and (feed.save_wanted or (every and self.step % every == 0))):
                    self._save(stage, index + 1)
                if feed.stopped or (inside and not self._evaluate_inside(stage, index + 1)):
                    return False
            self._journal.flush(stage.meter)
            return True
        finally:
            trace.close()
            self._parts.loader.close()

    def _evaluate_inside(self, stage: OpenStage, done: int) -> bool:
        """Evaluate at the end of an epoch of the stage, after saving a possible best checkpoint; see _evaluate."""
        if not self._evaluation.is_due(stage.plan, done):
            return True
        if self._config.evaluation.keep_best != "none" and not self.keeper.is_saved(self.step):
            self._save(stage, done)
        return self._evaluate(stage, done)

    def _evaluate(self, stage: OpenStage, done: int) -> bool:
        """Evaluate on every source; False if a stop was requested meanwhile (then a checkpoint is saved)."""
        self._journal.flush(stage.meter)
        with stage.meter.section("evaluation"), self._parts.watchdog.phase("evaluation"):
            last = done == stage.plan.steps and stage.plan.index == len(self._parts.plans) - 1
            rows = self._evaluation.run(stage.plan, self.step, last=last)
        if rows is None:
            if not self.keeper.is_saved(self.step):
                self._save(stage, done)
            return False
        self.keeper.evaluated(stage, self.step, rows)
        return True

    def _save(self, stage: OpenStage, steps_in_stage: int) -> None:
        """Write a checkpoint of the run's current state."""
        average_running_statistics(self._parts.model)
        self._journal.flush(stage.meter)
        with self._parts.watchdog.phase("checkpoint"):
            self.keeper.save(
                stage,
                steps_in_stage,
                self._feed.position,
                bad_clips=self._feed.ledger.to_json(),
                batch_parts=self._optimizer_step.batch_parts.numbers,
            )
        self._feed.checkpoint_saved()
