"""The loop: stages, steps, checkpoints, evaluations, in one process per device without relaunching.

Axis letters: B clips of one forward pass on this rank, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch

from frozen_fast.config import ExperimentConfig, StagePlan, to_plain
from frozen_fast.data import BadClipLedger, Batch, DataPosition, Source, TrainingLoader, plan_steps, twin_pairs
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.models.checkpoint import save_pretrained
from frozen_fast.profiling.energy import EnergyMeter
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.profiling.peak import DevicePeak
from frozen_fast.training import compiling
from frozen_fast.training.build import build_evaluation_loader
from frozen_fast.training.checkpoint import RunState, checkpoint_name, checkpoints, save_checkpoint
from frozen_fast.training.energy import StageEnergy
from frozen_fast.training.evaluate import Evaluation, evaluate_source
from frozen_fast.training.journal import Journal, StepResult
from frozen_fast.training.optimizer import learning_rate_factor, set_learning_rate
from frozen_fast.training.parallel import Parallel, seed_step
from frozen_fast.training.run_folder import RunFolder
from frozen_fast.training.signals import StopRequest, stop_explains
from frozen_fast.training.stages import expand_frames, warm_up_steps
from frozen_fast.training.step import forward_backward, update
from frozen_fast.training.trace import StageTrace
from frozen_kernels import chosen_backends

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The built parts of a run.

    Attributes:
        model: on its device and wrapped by `parallel`.
        sources: training sources by name.
        evaluation_sources: likewise.
        fingerprints: name -> what identifies a training source's clips.
        loader: training batches.
        plans: the stages, every number settled.
        flops_per_clip: (frames, text tokens, clips of a global batch) -> model FLOPs of one training clip, None where
            they are not known.
        peak: this device's peak, where known.
        energy: this device's energy meter, where there is one.
    """

    model: DualEncoder
    sources: Mapping[str, Source]
    evaluation_sources: Mapping[str, Source]
    fingerprints: Mapping[str, str]
    loader: TrainingLoader
    plans: Sequence[StagePlan]
    flops_per_clip: Callable[[int, int, int], float | None]
    peak: DevicePeak | None
    energy: EnergyMeter | None = None


@dataclass(frozen=True)
class _Stage:
    """A stage that is running: what is planned, where its time goes, and its energy."""

    plan: StagePlan
    meter: StageMeter
    energy: StageEnergy


class _StepGivenUp(Exception):  # noqa: N818  (it is no error: the run was told to stop)
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
        """Hold the parts; `state` is the checkpoint's that the run goes on from."""
        self._config, self._parallel, self._folder, self._parts = config, parallel, folder, parts
        self._journal, self._stop = journal, stop
        self._total_steps = sum(plan.steps for plan in parts.plans)
        self._position = DataPosition() if state is None else DataPosition.from_json(state.position)
        path = folder.bad_clips if parallel.is_main else None
        self._ledger = BadClipLedger(path, config.data.decode.max_bad_share)
        if state is not None:
            self._ledger.resume(state.bad_clips)
        self._stopped = False
        self.stage = 0 if state is None else state.stage
        self.decode_backends: dict[str, Counter[str]] = {name: Counter() for name in parts.sources}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._position.step

    def run(self, state: RunState | None, *, closed_stages: int = 0) -> bool:
        """Run every stage that is not done yet.

        Args:
            state: where to go on from; None: the beginning.
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

    def _run_stage(self, plan: StagePlan, state: RunState | None) -> bool:
        self.stage = plan.index
        done = 0 if state is None else state.steps_in_stage
        expand_frames(self._parallel, self._parts.model, plan.frames, self._config.model.expansion)
        if self._config.training.compile:
            sizes = {frames: plan.micro_batch_sizes[name] for name, frames in plan.source_frames.items()}
            compiling.begin_stage(
                self._parts.model, sizes, device=self._parallel.device, precision=self._parallel.precision
            )
        graphs = compiling.compiled_graphs()
        meter = StageMeter(
            stage=plan.index,
            frames=plan.frames,
            batch_sizes=plan.batch_sizes,
            device=self._parallel.device,
            num_devices=self._parallel.world_size,
            state=None if state is None else state.meter,
        )
        carried = 0.0 if state is None else state.meter.get("joules")
        stage = _Stage(plan, meter, StageEnergy(self._parallel, self._parts.energy, carried))
        log.info("stage %d/%d: %s", plan.index + 1, len(self._parts.plans), _describe(plan))
        if done < plan.steps:
            if not self._run_steps(stage, done):
                return False
            self._save(stage, plan.steps)
        if self._evaluation_due(plan):
            with meter.section("evaluation"):
                if not self._evaluate(plan):
                    return False
        graphs = compiling.compiled_graphs() - graphs
        joules = stage.energy.joules()
        if self._parallel.is_main:
            row = meter.stage_row(peak=self._parts.peak, recompilations=graphs, joules=joules)
            self._folder.put_stage_row(row)
            self._note_backends()
        return True

    def _run_steps(self, stage: _Stage, done: int) -> bool:
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
                    self._run_step(stage, batches, warmup=index < warm_up)
                except _StepGivenUp:
                    if not self._is_saved():
                        self._save(stage, index)
                    return False
                trace.after_step(index)
                every = config.checkpoints.every_steps
                if self._stopped or (every and self.step % every == 0 and index + 1 < plan.steps):
                    self._save(stage, index + 1)
                if self._stopped:
                    return False
            self._journal.flush(stage.meter)
            return True
        finally:
            trace.close()
            self._parts.loader.close()

    def _run_step(self, stage: _Stage, batches: Iterator[Batch], *, warmup: bool) -> None:
        """One optimizer step: next batch, forward, loss over all ranks' clips, backward, clip, update."""
        config, parallel, plan, meter = self._config, self._parallel, stage.plan, stage.meter
        step = self.step + 1
        seed_step(config.seed, step, parallel.rank)
        learning_rate = config.optimizer.learning_rate * plan.learning_rate_scale
        learning_rate *= learning_rate_factor(step, self._total_steps, config.optimizer)
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
                    batch.video_BTCHW,
                    batch.text,
                    config.loss,
                    accumulation=plan.accumulation,
                    last=pass_index == plan.accumulation - 1,
                )
                clips, tokens = plan.batch_sizes[batch.source], batch.text["input_ids"].shape[1]
                timing.count(clips, batch.frames, self._parts.flops_per_clip(batch.frames, tokens, clips))
            norm = update(parallel, config.optimizer.gradient_clip_norm)
        self._position = batch.spec.after
        self._journal.add(
            StepResult(
                step=step,
                stage=plan.index,
                frames=batch.frames,
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
            counts = (0 if batch is None else len(batch.bad_clips), int(batch is None))
            stop, (bad, without) = self._parallel.agree(error, stop=self._stop.asked, counts=counts)
        self._stopped = self._stopped or stop
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
            frames=plan.frames,
            accumulation=plan.accumulation,
            num_steps=plan.steps - done,
            start=self._position,
            rank=self._parallel.rank,
            world_size=self._parallel.world_size,
            pairs={one.name: twin_pairs(self._parts.sources[one.name]) for one in sources if one.twins_together},
        )

    def _save(self, stage: _Stage, steps_in_stage: int) -> None:
        """Write a checkpoint; refuses weights that are not finite, so that the last good one stays the newest."""
        parallel, model, plan, meter = self._parallel, self._parts.model, stage.plan, stage.meter
        self._journal.flush(meter)
        with meter.section("checkpoint"):
            if not parallel.weights_are_finite():
                raise UserError(
                    f"weights: not finite after step {self.step}; no checkpoint was written and the last one is good; "
                    f"{divergence_advice(self._config)}"
                )
            state = RunState(
                step=self.step,
                stage=plan.index,
                steps_in_stage=steps_in_stage,
                stage_complete=steps_in_stage == plan.steps,
                position=self._position.to_json(),
                meter={**meter.state_dict(), "joules": stage.energy.joules()},
                bad_clips=self._ledger.to_json(),
                learned_frames=model.learned_frames,
                world_size=parallel.world_size,
                config=to_plain(self._config),
                sources=dict(self._parts.fingerprints),
            )
            weights, optimizer = parallel.weights(), parallel.optimizer_state()
            with parallel.together():
                if parallel.is_main:
                    write = partial(save_pretrained, model, state=weights)
                    keep = self._config.checkpoints.keep
                    path = save_checkpoint(self._folder.checkpoints, state, write, optimizer, keep=keep)
                    self._folder.write_status("running", step=self.step, stage=plan.index)
                    log.info("saved %s", path)

    def _is_saved(self) -> bool:
        """Whether the run folder has a checkpoint of the last step; asks rank 0."""
        found = False
        if self._parallel.is_main:
            found = checkpoint_name(self.step) in [path.name for path in checkpoints(self._folder.checkpoints)]
        return bool(self._parallel.gather_objects(found)[0])

    def _note_backends(self) -> None:
        """Add what decoded and what computed attention, as chosen so far on this rank, to environment.json."""
        used = {name: dict(counts) for name, counts in self.decode_backends.items()}
        asked = self._config.model.video.attention
        attention = chosen_backends() if asked == "auto" else [{"backend": asked, "how": "model.video.attention"}]
        self._folder.update_environment(decode_backends=used, attention_backends=attention)

    def _evaluation_due(self, plan: StagePlan) -> bool:
        every = self._config.evaluation.every
        if not self._parts.evaluation_sources or every == "never":
            return False
        return every == "stage" or plan.index == len(self._parts.plans) - 1

    def _evaluate(self, plan: StagePlan) -> bool:
        """Evaluate on every source; False when told to stop meanwhile."""
        rows: list[dict[str, Any]] = []
        bad_clips: list[dict[str, Any]] = []
        eager = compiling.eager() if self._config.training.compile else nullcontext()
        with eager, self._parallel.whole_model() as model:
            for source in self._parts.evaluation_sources.values():
                found = evaluate_with(
                    self._config, cast(DualEncoder, model), source, self._parallel, frames=plan.frames, stop=self._stop
                )
                if found is None:
                    return False
                rows += [{"step": self.step, "stage": plan.index, **row} for row in found.rows]
                bad_clips += [{"step": self.step, **asdict(bad)} for bad in found.bad_clips]
        if self._parallel.is_main:
            self._folder.append_bad_clips(bad_clips)
            self._folder.add_evaluations(rows)
            self._journal.tell_evaluations(rows)
        return True


def evaluate_with(
    config: ExperimentConfig,
    model: DualEncoder,
    source: Source,
    parallel: Parallel,
    *,
    frames: int,
    stop: StopRequest,
) -> Evaluation | None:
    """Evaluate a model on one source as the config says; None when told to stop.

    Args:
        config: its evaluation and data.decode sections count.
        model: on its device.
        source: gallery and captions.
        parallel: ranks.
        frames: frames per window where evaluation.frames says none; pictures have one. A model that has learned fewer
            frames than evaluation.frames so far is shown those that it has learned.
        stop: this process's wish to stop.

    Raises:
        UserError: as evaluate_source; and where more clips than data.decode.max_bad_share cannot be read.
    """
    wanted = min(config.evaluation.frames or frames, model.learned_frames)
    frames = 1 if source.kind == "image" else wanted
    with parallel.together():
        loader = build_evaluation_loader(
            config, source, model, parallel.device, frames=frames, rank=parallel.rank, world_size=parallel.world_size
        )
    result = evaluate_source(
        model,
        source,
        loader,
        parallel,
        frames=frames,
        protocol=config.evaluation.protocol,
        batch_size=config.evaluation.batch_size,
        stop_asked=lambda: stop.asked,
    )
    if result is not None:
        ledger = BadClipLedger(None, config.data.decode.max_bad_share)
        ledger.record(0, len(source) - len(result.bad_clips), result.bad_clips)
        ledger.check(final=True)
    return result


def divergence_advice(config: ExperimentConfig) -> str:
    """Which keys to change when a loss or a weight is not finite."""
    optimizer = config.optimizer
    return (
        f"lower optimizer.learning_rate ({optimizer.learning_rate:g}), lengthen optimizer.warmup_steps "
        f"({optimizer.warmup_steps}) or set optimizer.gradient_clip_norm ({optimizer.gradient_clip_norm:g})"
    )


def _describe(plan: StagePlan) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in plan.batch_sizes.items())
    passes = f" x {plan.accumulation} passes" if plan.accumulation > 1 else ""
    return f"{plan.frames} frames, {plan.steps} steps, batch {sizes}{passes}"
