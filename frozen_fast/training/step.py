"""The computation of an optimizer step, shared by training and the throughput benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from frozen_fast.data import Batch
from frozen_fast.models.retrieval_model import RetrievalModel, VideoInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.training.task import Task
from frozen_fast.training.teachers import Teachers


def forward_backward(
    parallel: Parallel,
    video: VideoInput,
    text: Mapping[str, Tensor],
    task: Task,
    *,
    accumulation: int = 1,
    last: bool = True,
    teachers: Teachers | None = None,
    batch: Batch | None = None,
) -> Tensor:
    """One forward and backward pass: features, loss over all ranks' clips, gradients added to the parameters'.

    Args:
        parallel: holds the model.
        video: this rank's clips.
        text: their captions as tensors.
        task: what is minimised.
        accumulation: passes of this optimizer step, over which the gradient is averaged.
        last: gradients are exchanged between ranks in this pass.
        teachers: whose similarities of `batch` the model follows too; None: no distillation.
        batch: what the teachers read.

    Returns:
        This pass's share of the step's loss, equal on all ranks, detached.
    """
    with parallel.accumulate(last=last):
        text_features, video_features, parameters = parallel.forward(*task.inputs(video, text))
        model = cast(RetrievalModel, parallel.model)
        to_minimise, value = task.loss(model, text_features, video_features, parameters)
        if teachers is not None:
            assert batch is not None, "teachers read the batch"
            distilled, distilled_value = teachers.loss(
                model.pair_similarities, text_features, video_features, teachers.similarity(batch)
            )
            to_minimise, value = to_minimise + distilled, value + distilled_value
        parallel.backward(to_minimise / accumulation)
    return value / accumulation


def update(parallel: Parallel, gradient_clip_norm: float) -> Tensor | None:
    """Clip the gradients if a largest norm is given, apply them and clear them; returns the norm before clipping."""
    return parallel.update(gradient_clip_norm)
