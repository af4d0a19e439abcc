"""Re-ranking with knowledge of the whole test set. Reported under its own name, never as a plain result."""

from __future__ import annotations

import torch
from torch import Tensor

from frozen_fast.errors import UserError, unknown_name


def dual_softmax(sim_QV: Tensor, scale: float = 100.0, direction: str = "t2v") -> Tensor:
    """Similarities weighted by a softmax over the other side of the test set (dual softmax of CAMoE, 2021).

    A video that is close to every query loses; each query then competes with all others, so a result depends on the
    whole set of queries and is not comparable with one that ranks each query on its own.

    Args:
        sim_QV: similarities [Q, V].
        scale: factor on the similarities inside the softmax (100 suits cosines).
        direction: t2v normalises over the queries of a video, v2t over the videos of a query.

    Returns:
        [Q, V] in at least fp32, for one direction's metrics only.

    Raises:
        UserError: an unknown direction or a scale that is not above 0.
    """
    axes = {"t2v": 0, "v2t": 1}
    if direction not in axes:
        raise unknown_name("direction", direction, axes)
    if not scale > 0:
        raise UserError(f"scale: got {scale}; allowed: above 0")
    sim_QV = sim_QV if sim_QV.dtype == torch.float64 else sim_QV.float()
    return sim_QV * torch.softmax(sim_QV * scale, dim=axes[direction])
