"""Batches that do not fit in a device's memory: the message, and training.on_out_of_memory=smaller_micro_batch.

If a rank runs out of memory in the middle of a pass, the other ranks wait for it in a collective. The policy therefore
tries a pass without communication first: in the first two steps of each source in a stage, and for captions longer than
all earlier ones. The ranks then agree on the number of parts into which they split the batch.
"""

from __future__ import annotations

import logging

import torch

from frozen_fast.config import ExperimentConfig, StagePlan
from frozen_fast.data import Batch
from frozen_fast.errors import UserError
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.checkpoint import RunState
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.run_parts import RunParts
from frozen_fast.training.step import rehearse
from frozen_fast.training.teachers import student_video

log = logging.getLogger(__name__)


class DeviceMemoryError(UserError):
    """A device has run out of memory; other ranks may not know of it."""


class BatchParts:
    """Splits batches into parts that fit in memory, the same number on every rank.

    Attributes:
        numbers: source -> parts of its batches in this stage, for sources whose batches do not fit whole.
    """

    def __init__(self, config: ExperimentConfig, parallel: Parallel, folder: RunFolder, parts: RunParts) -> None:
        """Initialise from the parts of the run.

        Raises:
            UserError: the policy needs whole weights on every rank.
        """
        self._config, self._parallel, self._folder, self._parts = config, parallel, folder, parts
        self._halves = config.training.on_out_of_memory == "smaller_micro_batch"
        if self._halves and not parallel.holds_whole_weights:
            raise UserError(
                f"training.on_out_of_memory: got 'smaller_micro_batch' with {parallel.strategy}, whose passes exchange "
                "weights between ranks; allowed: stop, or one process, ddp, zero1, zero2"
            )
        self.numbers: dict[str, int] = {}
        self._fitted: dict[str, int] = {}

    def begin_stage(self, state: RunState | None) -> None:
        """Start with whole batches, or with the parts of the checkpoint that the stage continues from."""
        self.numbers = {} if state is None else {name: int(number) for name, number in state.batch_parts.items()}
        self._fitted = {}

    def cut(self, batch: Batch, plan: StagePlan) -> list[Batch]:
        """Split a batch into parts that fit; a collective under smaller_micro_batch.

        Raises:
            DeviceMemoryError: one clip does not fit; on every rank.
        """
        if not self._halves:
            return [batch]
        source = batch.source
        while True:
            parts = batch.parts(self.numbers.get(source, 1))
            # The optimizer creates its state in the first step, so the second step needs more memory.
            known = self._parallel.optimizer.state and self._fitted.get(source, 0) >= batch.text_tokens
            failed = not known and not self._fits(parts[-1], plan)
            _, (failures,) = self._parallel.agree(counts=(int(failed),))
            if not failures:
                if self._parallel.optimizer.state:
                    self._fitted[source] = max(self._fitted.get(source, 0), batch.text_tokens)
                return parts
            if len(parts[-1].clip_ids) == 1:
                raise self.error(batch, plan)
            self._halve(batch, plan, len(parts))

    def error(self, batch: Batch, plan: StagePlan) -> DeviceMemoryError:
        """Return the message for a batch that does not fit: where, how large, and which settings make it fit."""
        config, world, source = self._config, self._parallel.world_size, batch.source
        clips = -(-len(batch.clip_ids) // self.numbers.get(source, 1))
        where = f"step {batch.spec.step} (stage {plan.index}, {plan.source_frames[source]} frames, source {source})"
        got = f"{clips} clips a pass on rank {self._parallel.rank}, global batch {plan.batch_sizes[source]}"
        run_config = f"--config {self._folder.config} --frames {plan.frames}"
        helps = [f"a batch that fits (`frozen-fast find-batch-size {run_config}` measures the largest)"]
        blocks = len(getattr(self._parts.model, "video_model", self._parts.model).repeated_blocks())
        recomputed = config.model.video.checkpointed_blocks
        if recomputed < blocks:
            helps.append(f"model.video.checkpointed_blocks={blocks} (now {recomputed})")
        size = plan.batch_sizes[source]
        if clips > 1 and size % (2 * world) == 0:
            key = f"curriculum.stages[{plan.index}]"
            negatives = f"; {size // 2 - 1} negatives a clip in place of {size - 1}"
            helps.append(
                f"{key}.global_batch_size={size // 2} with curriculum.gradient_accumulation_steps="
                f"{2 * plan.accumulation} (as many clips a step{negatives if self._parts.task.has_negatives else ''})"
            )
        if not self._halves and self._parallel.holds_whole_weights:
            helps.append("training.on_out_of_memory=smaller_micro_batch")
        return DeviceMemoryError(f"out of memory at {where}: got {got}; allowed: {'; or '.join(helps)}")

    def _fits(self, part: Batch, plan: StagePlan) -> bool:
        video = student_video(part.video, plan.source_frames[part.source])
        try:
            rehearse(self._parallel, video, part.text, self._parts.task)
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        if self._parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # the trial's cached blocks may not fit the pass
        return fits

    def _halve(self, batch: Batch, plan: StagePlan, number: int) -> None:
        """Double the number of parts of a source's batches."""
        world, source = self._parallel.world_size, batch.source
        self.numbers[source] = min(2 * number, len(batch.clip_ids))
        self._fitted.pop(source, None)
        clips = [len(part.clip_ids) for part in (batch.parts(number)[-1], batch.parts(self.numbers[source])[-1])]
        before, after = (size * world - 1 for size in clips)
        message = (
            f"step {batch.spec.step}, stage {plan.index}, source {source}: {clips[0]} clips a pass on a rank do not "
            f"fit; now {self.numbers[source]} parts of {clips[1]}"
        )
        if self._parts.task.has_negatives:
            message += f"; a clip meets {after} negatives in place of {before}"
        log.warning("out of memory: %s", message)
        if self._parallel.is_main:
            self._folder.append_event("out_of_memory", message)
