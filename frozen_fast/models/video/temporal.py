"""Temporal embeddings for another number of frames: truncation and the three expansions of the paper's section 3.3."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.config.schema import Expansion
from frozen_fast.errors import UserError, unknown_name

EXPANSIONS: tuple[str, ...] = get_args(Expansion)


def expand_temporal_embedding(embed_1TD: Tensor, num_frames: int, method: str = "zero") -> Tensor:
    """Resize embeddings learned for T frames to another number of frames.

    Args:
        embed_1TD: [1, T, D].
        num_frames: the new T. Fewer frames keep the first rows, for every method.
        method: "zero" appends zeros; "nearest" repeats row floor(i*T/num_frames); "bilinear" interpolates between
            row centres (half-pixel centres, ends clamped: torch's align_corners=False). These are the released
            code's load_temporal_fix zeros, interp and bilinear.

    Returns:
        [1, num_frames, D], a new tensor.

    Raises:
        UserError: for an unknown method, or fewer than one frame.
    """
    if method not in EXPANSIONS:
        raise unknown_name("expansion", method, EXPANSIONS)
    if num_frames < 1:
        raise UserError(f"num_frames: got {num_frames}; allowed: 1 or more")
    learned = embed_1TD.shape[1]
    if num_frames <= learned:
        return embed_1TD[:, :num_frames].clone()
    if method == "zero":
        rows = embed_1TD.new_zeros(1, num_frames - learned, embed_1TD.shape[2])
        return torch.cat([embed_1TD, rows], dim=1)
    along_time = embed_1TD.transpose(1, 2)
    if method == "nearest":
        expanded = F.interpolate(along_time, num_frames, mode="nearest")
    else:
        expanded = F.interpolate(along_time, num_frames, mode="linear", align_corners=False)
    return expanded.transpose(1, 2).contiguous()
