"""What an optimizer step computes: the same lines in training and in the throughput benchmark.

Axis letters: B clips of one forward pass on this rank, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from frozen_fast.config.schema import LossConfig
from frozen_fast.losses import gathered_contrastive_loss
from frozen_fast.parallel.base import Parallel


def forward_backward(
    parallel: Parallel,
    video_BTCHW: Tensor,
    text: Mapping[str, Tensor],
    loss: LossConfig,
    *,
    accumulation: int = 1,
    last: bool = True,
) -> Tensor:
    """One forward and backward pass: embeddings, loss over all ranks' clips, gradients added to the parameters'.

    Args:
        parallel: holds the model.
        video_BTCHW: this rank's clips.
        text: their captions, input_ids and attention_mask [B, L].
        loss: temperature and how the loss is computed.
        accumulation: passes of this optimizer step, over which the gradient is averaged.
        last: gradients are exchanged between ranks in this pass.

    Returns:
        This pass's share of the step's loss, equal on all ranks, detached.
    """
    with parallel.accumulate(last=last):
        video_BD, text_BD = parallel.forward(video_BTCHW, text)
        to_minimise, value = gathered_contrastive_loss(
            video_BD, text_BD, loss.temperature, local=loss.local, chunk_rows=loss.chunk_rows
        )
        parallel.backward(to_minimise / accumulation)
    return value / accumulation


def update(parallel: Parallel, gradient_clip_norm: float) -> Tensor | None:
    """Clip the gradients where a largest norm is given, apply them and clear them; returns the norm before clipping."""
    return parallel.update(gradient_clip_norm)
