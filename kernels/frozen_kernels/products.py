"""A batched matrix product with a factor, as the attention backends for CPUs use it."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Scale * left @ right for [G, M, K] and [G, K, N], the factor applied before rounding; into out if given."""
    empty = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(empty, left, right, beta=0, alpha=scale, out=out)
