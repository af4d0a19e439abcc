"""Masks of short videos, as additive scores for attention and in means.

Axis letters: V clips, S tokens of a clip, N heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED_SCORE = -1e6
"""Value that the released code adds to the score of a masked key."""


def key_scores(mask_VS: Tensor, heads: int, compatible: bool) -> Tensor:
    """Return the values that masks add to attention scores.

    A clip without a valid key attends to all of its keys with the plain scores. The released code does the same, but
    its scores lose precision next to -1e6 (to 1/16 in fp32).

    Args:
        mask_VS: 1 for valid tokens.
        heads: N.
        compatible: reproduce the released code, which repeats the masks of all clips N times although attention expects
            N consecutive copies of each mask. Head h of clip v then uses the mask of clip (v * N + h) mod V.

    Returns:
        fp32 [V, 1, 1, S], or [V, N, 1, S] with `compatible`.
    """
    scores_VS = (1.0 - mask_VS.float()) * MASKED_SCORE
    if not compatible:
        return (scores_VS - scores_VS.amax(dim=1, keepdim=True))[:, None, None, :]
    clips = len(mask_VS)
    used = torch.arange(clips * heads, device=mask_VS.device) % clips
    return scores_VS[used].view(clips, heads, 1, -1)


def masked_mean(tokens_VSD: Tensor, mask_VS: Tensor | None) -> Tensor:
    """Return the mean over valid tokens: [V, S, D] -> [V, D]; zeros if none is valid."""
    if mask_VS is None:
        return tokens_VSD.mean(dim=1)
    weights_VS1 = mask_VS[..., None].to(tokens_VSD.dtype)
    return (tokens_VSD * weights_VS1).sum(dim=1) / weights_VS1.sum(dim=1).clamp(min=1)


def aligned(tokens_BSD: Tensor, mask_BS: Tensor | None, weight_center_KD: Tensor, emb_center_KD: Tensor) -> Tensor:
    """The Temporal Alignment Block: aggregate tokens at K shared centres, and average the centres.

    Let a = softmax over the centres of x W^T, and g_k = sum over valid tokens of a_k (x - C_k) for centre k. The result
    is l2(mean over k of l2(g_k)).

    Args:
        tokens_BSD: x, of a caption or a clip.
        mask_BS: 1 for valid tokens; None: all are valid.
        weight_center_KD: W.
        emb_center_KD: C.

    Returns:
        [B, D], of length 1.
    """
    shares_BSK = (tokens_BSD @ weight_center_KD.t()).softmax(dim=-1)
    if mask_BS is not None:
        shares_BSK = shares_BSK * mask_BS[..., None].to(shares_BSK.dtype)
    gathered_BKD = shares_BSK.transpose(1, 2) @ tokens_BSD - shares_BSK.sum(dim=1)[..., None] * emb_center_KD
    return F.normalize(F.normalize(gathered_BKD, dim=-1).mean(dim=1), dim=-1)
