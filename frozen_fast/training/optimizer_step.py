"""One optimizer step of a run: batches, forward and backward passes, update, record.

Axis letters: B clips of one forward pass on this rank, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from frozen_fast.config import ExperimentConfig, StagePlan
from frozen_fast.data import Batch
from frozen_fast.optimizers import learning_rate_factor, set_learning_rate
from frozen_fast.parallel.base import Parallel, seed_step
from frozen_fast.profiling.meter import StepTime
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.batch_feed import BatchFeed, StepGivenUp
from frozen_fast.training.batch_parts import BatchParts
from frozen_fast.training.journal import Journal, StepResult
from frozen_fast.training.run_parts import RunParts
from frozen_fast.training.stages import OpenStage
from frozen_fast.training.step import forward_backward, update
from frozen_fast.training.teachers import student_video


class OptimizerStep:
    """Runs optimizer steps and records them.

    Attributes:
        batch_parts: splits batches that do not fit in memory.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        parts: RunParts,
        feed: BatchFeed,
        journal: Journal,
    ) -> None:
        """Initialise from the parts of the run."""
        self._config, self._parallel, self._parts, self._feed, self._journal = config, parallel, parts, feed, journal
        self.batch_parts = BatchParts(config, parallel, folder, parts)

    def run(self, stage: OpenStage, batches: Iterator[Batch], *, warmup: bool) -> None:
        """Next batch, forward, loss over all ranks' clips, backward, clip, update.

        Args:
            stage: the stage that is running.
            batches: batches of the stage (BatchFeed.batches).
            warmup: exclude the step from speeds.

        Raises:
            UserError: bad clips past their share, a loss that is not finite, a mistake in the data; on every rank.
            StepGivenUp: a rank that was told to stop has lost its loader; on every rank.
        """
        config, parallel, plan, feed = self._config, self._parallel, stage.plan, self._feed
        step = feed.position.step + 1
        seed_step(config.seed, step, parallel.rank)
        learning_rate = config.optimizer.learning_rate * plan.learning_rate_scale
        learning_rate *= learning_rate_factor(step, self._parts.total_steps, config.optimizer, plan.epoch_steps)
        set_learning_rate(parallel.optimizer.param_groups, learning_rate)
        total = torch.zeros((), device=parallel.device)
        bad_clips = 0
        clip_ids: list[str] = []
        ledger = feed.ledger.to_json()
        with stage.meter.step(warmup=warmup) as timing:
            for pass_index in range(plan.accumulation):
                try:
                    batch, bad = feed.next_batch(batches, timing)
                except StepGivenUp:
                    feed.ledger.resume(ledger)  # the step's earlier batches are read again on resume
                    raise
                bad_clips += bad
                clip_ids += batch.clip_ids
                try:
                    total += self._pass(batch, plan, timing, last=pass_index == plan.accumulation - 1)
                except torch.OutOfMemoryError:
                    raise self.batch_parts.error(batch, plan) from None
                feed.read_ahead(batches, timing)
                clips, tokens = plan.batch_sizes[batch.source], batch.text_tokens
                frames = min(batch.frames, plan.frames)  # a teacher may read more frames
                timing.count(clips, frames, self._parts.flops_per_clip(frames, tokens, clips))
            skips = config.training.on_non_finite == "skip"
            try:
                norm = update(parallel, config.optimizer.gradient_clip_norm, skip_non_finite=skips)
            except torch.OutOfMemoryError:
                raise self.batch_parts.error(batch, plan) from None
        feed.position = batch.spec.after
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
                clip_ids=clip_ids,
            ),
            stage.meter,
        )

    def _pass(self, batch: Batch, plan: StagePlan, timing: StepTime, *, last: bool) -> Tensor:
        """Run forward and backward of a batch, in parts if it does not fit in memory; return its share of the loss."""
        total = torch.zeros((), device=self._parallel.device)
        parts = self.batch_parts.cut(batch, plan)
        for index, part in enumerate(parts):
            total += forward_backward(
                self._parallel,
                student_video(part.video, plan.source_frames[part.source]),
                part.text,
                self._parts.task,
                accumulation=plan.accumulation * len(batch.clip_ids) / len(part.clip_ids),
                last=last and index == len(parts) - 1,
                teachers=self._parts.teachers,
                batch=part,
                timing=timing,
            )
        return total
