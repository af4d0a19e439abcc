"""The computation of an optimizer step, shared by training and the throughput benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from frozen_fast.data import Batch
from frozen_fast.models.retrieval_model import RetrievalModel, VideoInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.meter import StepTime
from frozen_fast.training.task import Task
from frozen_fast.training.teachers import Teachers


def forward_backward(
    parallel: Parallel,
    video: VideoInput,
    text: Mapping[str, Tensor],
    task: Task,
    *,
    accumulation: float = 1,
    last: bool = True,
    teachers: Teachers | None = None,
    batch: Batch | None = None,
    timing: StepTime | None = None,
) -> Tensor:
    """One forward and backward pass: features, loss over all ranks' clips, gradients added to the parameters'.

    Args:
        parallel: holds the model.
        video: clips of this rank.
        text: their captions as tensors.
        task: computes the loss.
        accumulation: the pass contributes 1 / accumulation of the step's loss and gradient.
        last: whether gradients are exchanged between ranks in this pass.
        teachers: teachers for distillation; None: no distillation.
        batch: the batch that the teachers read.
        timing: records the time of the features, without waiting for other ranks.

    Returns:
        This pass's share of the step's loss, equal on all ranks, detached. If it is not finite, no gradient is finite.
    """
    with parallel.accumulate(last=last):
        inputs = task.inputs(video, text)
        with nullcontext() if timing is None else timing.forward():
            text_features, video_features, parameters = parallel.forward(*inputs)
        model = cast(RetrievalModel, parallel.model)
        to_minimise, value = task.loss(model, text_features, video_features, parameters)
        if teachers is not None:
            assert batch is not None, "teachers read the batch"
            distilled, distilled_value = teachers.loss(
                model.pair_similarities, text_features, video_features, teachers.similarity(batch)
            )
            to_minimise, value = to_minimise + distilled, value + distilled_value
        parallel.backward(to_minimise / (accumulation + (value - value)))  # value - value: 0, or NaN for NaN and inf
    return value / accumulation


def rehearse(parallel: Parallel, video: VideoInput, text: Mapping[str, Tensor], task: Task) -> None:
    """Run a pass that needs the memory of forward_backward on this rank alone, without changing any state.

    Every rank must hold whole weights.

    Raises:
        torch.OutOfMemoryError: the pass does not fit.
    """
    model = cast(RetrievalModel, parallel.model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng([parallel.device] if parallel.device.type == "cuda" else []):
            with parallel.autocast():
                text_features, video_features, parameters = model(*task.inputs(video, text))
            total = task.rehearsal_loss(model, text_features, video_features, parameters, parallel.world_size)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(total, trained, allow_unused=True)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():  # running averages
                buffer.copy_(buffers[name])


def update(parallel: Parallel, gradient_clip_norm: float, *, skip_non_finite: bool = False) -> Tensor:
    """Clip the gradients if a maximum norm is given, apply them and clear them; see Parallel.update.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    return parallel.update(gradient_clip_norm, skip_non_finite=skip_non_finite)
