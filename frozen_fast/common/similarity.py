"""Cosine similarities, for losses, models and evaluation alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_similarities(rows_QD: Tensor, columns_VD: Tensor) -> Tensor:
    """Cosine of every row with every column: [Q, D] and [V, D] -> [Q, V], fp32 (fp64 where both sides are)."""
    dtype = torch.float64 if rows_QD.dtype == columns_VD.dtype == torch.float64 else torch.float32
    return F.normalize(rows_QD.to(dtype), dim=-1) @ F.normalize(columns_VD.to(dtype), dim=-1).T
