"""A loss over the clips of all ranks: features are gathered with their gradient, and a rank computes its own anchors.

Axis letters: B clips of this rank, G = world_size * B clips of all ranks, K similarities of a pair, A anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from frozen_fast.common.autocast import without_autocast
from frozen_fast.common.ranks import (
    gather_counts,
    gather_with_gradient,
    is_distributed,
    mean_over_ranks,
    rank,
    refuse_other_counts,
    world_size,
)
from frozen_fast.errors import UserError
from frozen_fast.losses.retrieval_loss import Direction, RetrievalLoss

Features = Mapping[str, Tensor]
Compare = Callable[[Features, Features], Tensor]
"""(features of Q captions, features of V clips) -> sim_KQV: RetrievalModel.pair_similarities."""


def batch_loss(loss: RetrievalLoss, sim_KBB: Tensor, parameters: Features) -> Tensor:
    """The loss of one batch from its similarities, averaged over K; caption i belongs to clip i."""
    sides: dict[Direction, Tensor] = {"t2v": sim_KBB, "v2t": sim_KBB.transpose(1, 2)}
    shares = [loss.anchor_loss(sim_BB, 0, parameters) for direction in loss.directions for sim_BB in sides[direction]]
    return torch.stack(shares).sum() / len(sim_KBB)


def gathered_loss(
    compare: Compare,
    loss: RetrievalLoss,
    text: Features,
    video: Features,
    parameters: Features | None = None,
    *,
    local: bool = True,
    chunk_rows: int = 0,
    gather_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A retrieval loss with the clips and captions of all ranks as candidates.

    With gradients averaged over ranks (DDP, ZeRO, FSDP), parameters get the gradient of one process with the whole
    batch, for all options.

    Args:
        compare: the model's pair_similarities; it must not read parameters, because strategies gather sharded
            parameters in the model's forward pass only.
        loss: the loss; with K similarities per pair, the mean of the K losses.
        text: features of this rank's B captions, floating tensors [B, ...]; shapes equal on all ranks.
        video: features of this rank's B clips.
        parameters: RetrievalModel.loss_parameters.
        local: compute only this rank's anchors of both directions, 2 * B * G similarities; otherwise every rank
            computes all G * G of them.
        chunk_rows: number of anchors computed at once and recomputed in the backward pass, so that at most
            chunk_rows * G similarities are in memory; 0: all.
        gather_dtype: what ranks send each other their features in; they are rounded to it, this rank's own too, and
            their gradients are not. None: fp32 (fp64 for fp64 features).

    Returns:
        (loss to backpropagate on this rank, value of the whole batch's loss, detached and equal on all ranks). Both in
        fp32 (fp64 for fp64 features), also under autocast.

    Raises:
        UserError: an empty batch, sides of different length, a negative chunk_rows, or ranks with different numbers
            of clips.
    """
    parameters = parameters or {}
    clips, device = _check(text, video, chunk_rows)
    with without_autocast(device.type):
        all_text, all_video = _gather(text, video, gather_dtype)
        alone = not is_distributed()
        if not chunk_rows and (alone or not local):
            sim_KGG = compare(all_text, all_video)
            total = batch_loss(loss, sim_KGG, parameters)
        else:
            first, count = (rank() * clips, clips) if local else (0, clips * world_size())
            total = anchors_loss(compare, loss, all_text, all_video, first, count, chunk_rows or count, parameters)
        if alone or not local:
            return total, total.detach()
        total = total * world_size()  # gradients are averaged over ranks; a rank has the loss of its anchors
        return total, mean_over_ranks(total)


def anchors_loss(
    compare: Compare,
    loss: RetrievalLoss,
    text: Features,
    video: Features,
    first: int,
    count: int,
    chunk: int,
    parameters: Features,
) -> Tensor:
    """The loss of anchors first .. first + count, `chunk` of them at a time; recomputed in the backward pass."""

    def share(direction: Direction, start: int, stop: int) -> Tensor:
        anchors, candidates = (text, video) if direction == "t2v" else (video, text)
        own = {name: tensor[start:stop] for name, tensor in anchors.items()}
        sim_KQV = compare(own, candidates) if direction == "t2v" else compare(candidates, own)
        sim_KAG = sim_KQV if direction == "t2v" else sim_KQV.transpose(1, 2)
        shares = [loss.anchor_loss(sim_AG, start, parameters) for sim_AG in sim_KAG]
        return torch.stack(shares).mean()

    shares = []
    for direction in loss.directions:
        for start in range(first, first + count, chunk):
            bounds = (direction, start, min(start + chunk, first + count))
            if chunk >= count:
                shares.append(share(*bounds))
            else:
                shares.append(checkpoint(share, *bounds, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(shares).sum()


def _gather(text: Features, video: Features, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gather the features of all ranks in rank order, with one collective."""
    named = [("text", name, tensor) for name, tensor in text.items()]
    named += [("video", name, tensor) for name, tensor in video.items()]
    double = all(tensor.dtype == torch.float64 for _, _, tensor in named)
    wide = [tensor.to(torch.float64 if double else torch.float32) for _, _, tensor in named]
    if is_distributed():
        flat = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in wide]
        rows = gather_with_gradient(torch.cat(flat, dim=1), dtype).split([part.shape[1] for part in flat], dim=1)
        wide = [row.reshape(len(row), *tensor.shape[1:]) for row, tensor in zip(rows, wide, strict=True)]
    sides: dict[str, dict[str, Tensor]] = {"text": {}, "video": {}}
    for (side, name, _), tensor in zip(named, wide, strict=True):
        sides[side][name] = tensor
    return sides["text"], sides["video"]


def _check(text: Features, video: Features, chunk_rows: int) -> tuple[int, torch.device]:
    """Check the inputs; return the number of clips of this rank and their device."""
    if chunk_rows < 0:
        raise UserError(f"loss.chunk_rows: got {chunk_rows}; allowed: 0 or more")
    lengths = {len(tensor) for tensor in (*text.values(), *video.values())}
    if len(lengths) != 1 or 0 in lengths:
        shapes = {name: list(tensor.shape) for name, tensor in (*text.items(), *video.items())}
        raise UserError(f"loss: got features of shapes {shapes}; allowed: the same number of rows B >= 1 for all")
    clips, device = lengths.pop(), next(iter(video.values())).device
    if is_distributed():
        if device.type == "cpu":
            counts = gather_counts(clips, device)
            if len(set(counts)) > 1:
                allowed = f"the same number on each of the {world_size()} ranks"
                raise UserError(f"clips per rank: got {counts}; allowed: {allowed}")
        else:
            refuse_other_counts(clips, device)
    return clips, device
