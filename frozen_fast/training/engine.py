"""The loop: stages, steps, checkpoints, evaluations, in one process per device without relaunching.

Axis letters: B clips of one forward pass on this rank, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from frozen_fast.config import ExperimentConfig, StagePlan
from frozen_fast.data import BadClipLedger, Batch, DataPosition, Source, TrainingLoader, plan_steps, twin_pairs
from frozen_fast.data.load.feature_loader import FeatureTrainingLoader
from frozen_fast.losses import RetrievalLoss
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.optimizers import learning_rate_factor, set_learning_rate
from frozen_fast.parallel.base import Parallel, seed_step
from frozen_fast.parallel.running_statistics import average_running_statistics
from frozen_fast.profiling.energy import EnergyMeter
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.profiling.peak import DevicePeak
from frozen_fast.profiling.trace import StageTrace
from frozen_fast.records.checkpoint import RunState
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training import compiling
from frozen_fast.training.checkpoint_keeper import CheckpointKeeper
from frozen_fast.training.journal import Journal, StepResult
from frozen_fast.training.signals import StopRequest, stop_explains
from frozen_fast.training.stage_energy import StageEnergy
from frozen_fast.training.stage_evaluation import StageEvaluation
from frozen_fast.training.stages import OpenStage, describe_plan, expand_frames, warm_up_steps
from frozen_fast.training.step import forward_backward, update
from frozen_fast.training.teachers import Teachers, student_video
from frozen_fast.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The built parts of a run.

    Attributes:
        model: on its device and wrapped by `parallel`.
        loss: what training minimises.
        sources: training sources by name.
        evaluation_sources: likewise.
        fingerprints: name -> what identifies a training source's clips.
        loader: training batches.
        plans: the stages, every number settled.
        flops_per_clip: (frames, text tokens, clips of a global batch) -> model FLOPs of one training clip, None where
            they are not known.
        peak: this device's peak, where known.
        energy: this device's energy meter, where there is one.
        teachers: whose similarities the model follows, where the config names some.
        watchdog: watches the time of each phase.
    """

    model: RetrievalModel
    loss: RetrievalLoss
    sources: Mapping[str, Source]
    evaluation_sources: Mapping[str, Source]
    fingerprints: Mapping[str, str]
    loader: TrainingLoader | FeatureTrainingLoader
    plans: Sequence[StagePlan]
    flops_per_clip: Callable[[int, int, int], float | None]
    peak: DevicePeak | None
    energy: EnergyMeter | None = None
    teachers: Teachers | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)


class _StepGivenUp(Exception):
    """A rank has no batch because its loader was stopped with it; every rank raises it at the same pass."""


class Engine:
    """Runs the stages of one experiment from where a run stands."""

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
        """Hold the parts; `state` is that of the checkpoint to resume from."""
        self._config, self._parallel, self._folder, self._parts = config, parallel, folder, parts
        self._journal, self._stop = journal, stop
        self._total_steps = sum(plan.steps for plan in parts.plans)
        self._position = DataPosition() if state is None else DataPosition.from_json(state.position)
        path = folder.bad_clips if parallel.is_main else None
        self._ledger = BadClipLedger(path, config.data.decode.max_bad_share)
        if state is not None:
            self._ledger.resume(state.bad_clips)
        self._keeper = CheckpointKeeper(config, parallel, folder, parts.model, parts.fingerprints, state)
        self._evaluation = StageEvaluation(
            config, parallel, folder, parts.evaluation_sources, len(parts.plans), journal, stop
        )
        self._stopped = False
        self._save_wanted = False
        self.stage = 0 if state is None else state.stage
        self.decode_backends: dict[str, Counter[str]] = {name: Counter() for name in parts.sources}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._position.step

    def run(self, state: RunState | None, *, closed_stages: int = 0) -> bool:
        """Run every stage that is not done yet.

        Args:
            state: of the checkpoint to resume from; None: start at the first step.
            closed_stages: stages whose evaluation and row are written already.

        Returns:
            True when the run is complete, False when it was told to stop (a checkpoint has been saved).

        Raises:
            UserError: bad clips past their share, a loss that is not finite, a mistake in the data; on every rank.
        """
        for plan in self._parts.plans:
            if plan.index < closed_stages:
                continue
            here = state if state is not None and state.stage == plan.index else None
            if not self._run_stage(plan, here):
                return False
        self._ledger.check(final=True)
        return True

    def finish(self, *, stopped: bool) -> None:
        """Wait until the last checkpoint is on disk; every rank calls it.

        Args:
            stopped: the run was told to stop.

        Raises:
            UserError: the disk refuses it.
        """
        self._keeper.finish(stopped=stopped)

    def close(self) -> None:
        """Wait for a checkpoint that is being written, where the run ends with an error."""
        self._keeper.close()

    def _run_stage(self, plan: StagePlan, state: RunState | None) -> bool:
        self.stage = plan.index
        done = 0 if state is None else state.steps_in_stage
        stage = self._open(plan, state)
        log.info("stage %d/%d: %s", plan.index + 1, len(self._parts.plans), describe_plan(plan))
        self._keeper.settle()  # what is being written tells of the model's frames
        with stage.meter.section("warmup"):
            self._prepare(plan)
        graphs = compiling.compiled_graphs()
        if done < plan.steps:
            if state is not None and not state.evaluated and not self._evaluate_inside(stage, done):
                return False
            if not self._run_steps(stage, done):
                return False
            self._save(stage, plan.steps)
        if self._evaluation.is_due(plan, plan.steps) and not self._evaluate(stage, plan.steps):
            return False
        graphs = compiling.compiled_graphs() - graphs
        joules = stage.energy.joules()
        with self._parallel.together():
            if self._parallel.is_main:
                row = stage.meter.stage_row(peak=self._parts.peak, recompilations=graphs, joules=joules)
                self._folder.put_stage_row(row)
                self._note_backends()
        return True

    def _open(self, plan: StagePlan, state: RunState | None) -> OpenStage:
        """Begin to time a stage, or go on where a checkpoint left it."""
        meter = StageMeter(
            stage=plan.index,
            frames=plan.frames,
            batch_sizes=plan.batch_sizes,
            device=self._parallel.device,
            num_devices=self._parallel.world_size,
            state=None if state is None else state.meter,
        )
        carried = 0.0 if state is None else state.meter.get("joules")
        return OpenStage(plan, meter, StageEnergy(self._parallel, self._parts.energy, carried))

    def _prepare(self, plan: StagePlan) -> None:
        """Let the model see the stage's frames, and compile for its batches."""
        expand_frames(self._parallel, self._parts.model, plan.frames, self._config.model.expansion)
        if self._config.training.compile:
            sizes = {frames: plan.micro_batch_sizes[name] for name, frames in plan.source_frames.items()}
            compiling.begin_stage(
                self._parts.model, sizes, device=self._parallel.device, precision=self._parallel.precision
            )

    def _run_steps(self, stage: OpenStage, done: int) -> bool:
        """The stage's remaining steps; False when told to stop (then saved)."""
        config, parallel, plan = self._config, self._parallel, stage.plan
        batches = self._batches(plan, done)
        warm_up = done + warm_up_steps(plan.steps, sum(source.weight > 0 for source in config.data.sources))
        trace = StageTrace(
            self._folder.traces,
            plan.index,
            first=warm_up,
            steps=config.training.profile_steps if parallel.is_main else 0,
            device=parallel.device,
        )
        try:
            for index in range(done, plan.steps):
                trace.before_step(index)
                try:
                    with self._parts.watchdog.phase("first_step" if index == done else "step"):
                        self._run_step(stage, batches, warmup=index < warm_up)
                except _StepGivenUp:
                    if not self._keeper.is_saved(self.step):
                        self._save(stage, index)
                    return False
                trace.after_step(index)
                if not self._end_step(stage, index + 1):
                    return False
            self._journal.flush(stage.meter)
            return True
        finally:
            trace.close()
            self._parts.loader.close()

    def _end_step(self, stage: OpenStage, done: int) -> bool:
        """Save and evaluate where that is due after a step inside the stage; False when told to stop (then saved)."""
        every = self._config.checkpoints.every_steps
        inside = done < stage.plan.steps
        if self._stopped or (inside and (self._save_wanted or (every and self.step % every == 0))):
            self._save(stage, done)
            self._save_wanted = False
        return not self._stopped and (not inside or self._evaluate_inside(stage, done))

    def _evaluate_inside(self, stage: OpenStage, done: int) -> bool:
        """Evaluate where an epoch of the stage ends; what may become the best is saved first; False as _evaluate."""
        if not self._evaluation.is_due(stage.plan, done):
            return True
        if self._config.evaluation.keep_best != "none" and not self._keeper.is_saved(self.step):
            self._save(stage, done)
        return self._evaluate(stage, done)

    def _run_step(self, stage: OpenStage, batches: Iterator[Batch], *, warmup: bool) -> None:
        """One optimizer step: next batch, forward, loss over all ranks' clips, backward, clip, update."""
        config, parallel, plan, meter = self._config, self._parallel, stage.plan, stage.meter
        step = self.step + 1
        seed_step(config.seed, step, parallel.rank)
        learning_rate = config.optimizer.learning_rate * plan.learning_rate_scale
        learning_rate *= learning_rate_factor(step, self._total_steps, config.optimizer, plan.epoch_steps)
        set_learning_rate(parallel.optimizer.param_groups, learning_rate)
        total = torch.zeros((), device=parallel.device)
        bad_clips = 0
        ledger = self._ledger.to_json()
        with meter.step(warmup=warmup) as timing:
            for pass_index in range(plan.accumulation):
                try:
                    batch, bad = self._next_batch(batches, timing, step)
                except _StepGivenUp:
                    self._ledger.resume(ledger)  # the step's earlier passes will be read again
                    raise
                bad_clips += bad
                total += forward_backward(
                    parallel,
                    student_video(batch.video, plan.source_frames[batch.source]),
                    batch.text,
                    self._parts.loss,
                    config.loss,
                    accumulation=plan.accumulation,
                    last=pass_index == plan.accumulation - 1,
                    teachers=self._parts.teachers,
                    batch=batch,
                )
                clips, tokens = plan.batch_sizes[batch.source], batch.text_tokens
                frames = min(batch.frames, plan.frames)  # a teacher may have seen more
                timing.count(clips, frames, self._parts.flops_per_clip(frames, tokens, clips))
            norm = update(parallel, config.optimizer.gradient_clip_norm)
        self._position = batch.spec.after
        self._journal.add(
            StepResult(
                step=step,
                stage=plan.index,
                frames=frames,
                source=batch.source,
                loss=total,
                gradient_norm=norm,
                learning_rate=learning_rate,
                bad_clips=bad_clips,
            ),
            meter,
        )

    def _next_batch(self, batches: Iterator[Batch], timing: StepTime, step: int) -> tuple[Batch, int]:
        """The next batch and the bad clips of all ranks in it; here the ranks agree that all is well.

        Raises:
            UserError: a clip that cannot be read under policy error, or too many of them; on every rank.
            _StepGivenUp: told to stop, and a rank's loader is gone; on every rank.
        """
        error: Exception | None = None
        batch: Batch | None = None
        with timing.stall():
            try:
                batch = next(batches)
            except StopIteration:
                error = RuntimeError("the loader ended before the stage did")
            except Exception as caught:  # told to the other ranks, then raised by agree()
                error = caught
            if error is not None and stop_explains(error, lambda: self._stop.asked):
                error = None
            wanted = self._stop.take_save_request() or self._keeper.is_due
            counts = (0 if batch is None else len(batch.bad_clips), int(batch is None), int(wanted))
            stop, (bad, without, save) = self._parallel.agree(error, stop=self._stop.asked, counts=counts)
        self._stopped = self._stopped or stop
        self._save_wanted = self._save_wanted or save > 0
        if without:
            raise _StepGivenUp
        assert batch is not None
        self.decode_backends[batch.source] += batch.backends
        found = self._parallel.gather_objects(batch.bad_clips) if bad else []
        self._ledger.record(
            step, len(batch.clip_ids) * self._parallel.world_size, [clip for clips in found for clip in clips]
        )
        self._ledger.check()
        return batch, bad

    def _batches(self, plan: StagePlan, done: int) -> Iterator[Batch]:
        """The batches of the stage's remaining steps; reading begins with the first, whose failures are its own."""
        yield from self._parts.loader.batches(self._specs(plan, done))

    def _specs(self, plan: StagePlan, done: int) -> Iterator[Any]:
        sources = self._config.data.sources
        return plan_steps(
            {name: len(source) for name, source in self._parts.sources.items()},
            {source.name: source.weight for source in sources},
            self._config.data.order,
            self._config.seed,
            batch_sizes=plan.batch_sizes,
            frames=plan.frames if self._parts.teachers is None else self._parts.teachers.frames_to_read(plan.frames),
            accumulation=plan.accumulation,
            num_steps=plan.steps - done,
            start=self._position,
            rank=self._parallel.rank,
            world_size=self._parallel.world_size,
            pairs={one.name: twin_pairs(self._parts.sources[one.name]) for one in sources if one.twins_together},
        )

    def _save(self, stage: OpenStage, steps_in_stage: int) -> None:
        """Write a checkpoint of where the run stands."""
        average_running_statistics(self._parts.model)
        self._journal.flush(stage.meter)
        with self._parts.watchdog.phase("checkpoint"):
            self._keeper.save(stage, steps_in_stage, self._position, self._ledger.to_json())

    def _note_backends(self) -> None:
        """Add what decoded, and which kernels the video tower used so far on this rank."""
        used = {name: dict(counts) for name, counts in self.decode_backends.items()}
        kernels = self._parts.model.kernels_used(self._parallel.device, compiled=self._config.training.compile)
        self._folder.update_environment(decode_backends=used, **kernels)

    def _evaluate(self, stage: OpenStage, done: int) -> bool:
        """Evaluate on every source; False if a stop was requested meanwhile (then a checkpoint is saved)."""
        self._journal.flush(stage.meter)
        with stage.meter.section("evaluation"), self._parts.watchdog.phase("evaluation"):
            rows = self._evaluation.run(stage.plan, self.step)
        if rows is None:
            if not self._keeper.is_saved(self.step):
                self._save(stage, done)
            return False
        self._keeper.evaluated(stage, self.step, rows)
        return True
