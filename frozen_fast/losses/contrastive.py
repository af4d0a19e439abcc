"""Symmetric InfoNCE over the clips of a batch, on one process or gathered over many.

Axis letters: B clips of this rank, G = world_size * B clips of all ranks, D width of the common space,
K rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from frozen_fast.common.ranks import (
    gather_counts,
    gather_with_gradient,
    is_distributed,
    mean_over_ranks,
    rank,
    world_size,
)
from frozen_fast.errors import UserError

# The batch size that all ranks were last seen to agree on: {device type: B}. Reading a count back from a GPU stalls
# its queue, so there the agreement is checked again only when this rank's own B changes.
_agreed_batch_size: dict[str, int] = {}


def contrastive_loss(video_BD: Tensor, text_BD: Tensor, temperature: float = 0.05) -> Tensor:
    """Symmetric InfoNCE of a batch in which row i of both sides belongs together.

    Args:
        video_BD: video embeddings [B, D], any floating type; normalised inside.
        text_BD: text embeddings [B, D]; normalised inside.
        temperature: divides the cosine similarities; above 0.

    Returns:
        Scalar: mean cross-entropy of video-to-text plus that of text-to-video (a sum, Frozen in Time equations 1-2),
        computed in fp32 (fp64 for fp64 input), also under autocast.

    Raises:
        UserError: the shapes differ, the batch is empty, or the temperature is not above 0.
    """
    _check(video_BD, text_BD, temperature)
    with torch.autocast(video_BD.device.type, enabled=False):
        video_BD, text_BD = _normalised(video_BD), _normalised(text_BD)
        logits_BB = video_BD @ text_BD.T / temperature
        own_B = torch.arange(len(logits_BB), device=logits_BB.device)
        return F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)


def gathered_contrastive_loss(
    video_BD: Tensor,
    text_BD: Tensor,
    temperature: float = 0.05,
    *,
    local: bool = True,
    chunk_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE with the clips of all ranks as negatives.

    With gradients averaged over ranks (DDP, ZeRO, FSDP), parameters receive the gradient that one process with the
    whole batch would give them, whichever of the options is chosen.

    Args:
        video_BD: this rank's video embeddings [B, D]; B equal on all ranks.
        text_BD: this rank's text embeddings [B, D].
        temperature: divides the cosine similarities; above 0.
        local: compute only this rank's rows of both directions, 2 * B * G logits; otherwise every rank computes all
            G * G of them.
        chunk_rows: compute logits in chunks of so many rows and again in the backward pass, so that at most
            chunk_rows * G of them are alive at once; 0: all at once. With local=False each direction is computed on
            its own when chunked.

    Returns:
        (loss to backpropagate on this rank, value of the whole batch's loss, detached and equal on all ranks).

    Raises:
        UserError: as contrastive_loss, and when ranks hold different numbers of clips.
    """
    _check(video_BD, text_BD, temperature)
    if chunk_rows < 0:
        raise UserError(f"loss.chunk_rows: got {chunk_rows}; allowed: 0 or more")
    _check_equal_batches(video_BD)
    with torch.autocast(video_BD.device.type, enabled=False):
        video_BD, text_BD = _normalised(video_BD), _normalised(text_BD)
        # One collective for both sides.
        both_G2D = gather_with_gradient(torch.cat((video_BD, text_BD), dim=1))
        video_GD, text_GD = both_G2D.chunk(2, dim=1)
        if local:
            first = rank() * len(video_BD)
            loss = _rows_loss(video_BD, text_GD, first, temperature, chunk_rows)
            loss = loss + _rows_loss(text_BD, video_GD, first, temperature, chunk_rows)
            return loss, mean_over_ranks(loss)
        if chunk_rows:
            loss = _rows_loss(video_GD, text_GD, 0, temperature, chunk_rows)
            loss = loss + _rows_loss(text_GD, video_GD, 0, temperature, chunk_rows)
            return loss, loss.detach()
        logits_GG = video_GD @ text_GD.T / temperature
        own_G = torch.arange(len(logits_GG), device=logits_GG.device)
        loss = F.cross_entropy(logits_GG, own_G) + F.cross_entropy(logits_GG.T, own_G)
        return loss, loss.detach()


def _rows_loss(rows_KD: Tensor, keys_GD: Tensor, first: int, temperature: float, chunk_rows: int) -> Tensor:
    """Mean cross-entropy of rows against all keys; row i belongs to key first + i."""
    if not chunk_rows or chunk_rows >= len(rows_KD):
        return _cross_entropy_sum(rows_KD, keys_GD, first, temperature) / len(rows_KD)
    total = rows_KD.new_zeros(())
    for start in range(0, len(rows_KD), chunk_rows):
        chunk_KD = rows_KD[start : start + chunk_rows]
        total = total + checkpoint(
            _cross_entropy_sum,
            chunk_KD,
            keys_GD,
            first + start,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(rows_KD)


def _cross_entropy_sum(rows_KD: Tensor, keys_GD: Tensor, first: int, temperature: float) -> Tensor:
    own_K = torch.arange(first, first + len(rows_KD), device=rows_KD.device)
    return F.cross_entropy(rows_KD @ keys_GD.T / temperature, own_K, reduction="sum")


def _normalised(rows_BD: Tensor) -> Tensor:
    """Rows of length 1 in at least fp32."""
    return F.normalize(rows_BD if rows_BD.dtype == torch.float64 else rows_BD.float(), dim=-1)


def _check(video_BD: Tensor, text_BD: Tensor, temperature: float) -> None:
    if video_BD.ndim != 2 or video_BD.shape != text_BD.shape or not len(video_BD):
        got = f"{list(video_BD.shape)} and {list(text_BD.shape)}"
        raise UserError(f"loss: got video and text embeddings of shapes {got}; allowed: the same [B, D] with B >= 1")
    if not temperature > 0:
        raise UserError(f"loss.temperature: got {temperature}; allowed: above 0")


def _check_equal_batches(video_BD: Tensor) -> None:
    """Raise on every rank when the ranks hold different numbers of clips."""
    device = video_BD.device
    if not is_distributed() or (device.type != "cpu" and _agreed_batch_size.get(device.type) == len(video_BD)):
        return
    counts = gather_counts(len(video_BD), device)
    if len(set(counts)) > 1:
        raise UserError(f"clips per rank: got {counts}; allowed: the same number on each of the {world_size()} ranks")
    _agreed_batch_size[device.type] = len(video_BD)
