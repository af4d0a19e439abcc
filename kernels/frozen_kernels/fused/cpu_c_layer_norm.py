"""C form of frozen_kernels.fused.layer_norm, for CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from frozen_kernels.cpu_c.library import KINDS, in_parallel, load_kernels

TASKS = 32
"""Parts of the rows in the backward pass, each with its own sums of the weight's and bias's gradients."""
NONE = -1


def _library(
    total: torch.dtype,
    normed: torch.dtype,
    *,
    x: torch.dtype | None = None,
    branch: torch.dtype | None = None,
    narrow: torch.dtype | None = None,
) -> ctypes.CDLL:
    kinds = {"X": x or total, "BRANCH": branch, "TOTAL": total, "NORMED": normed, "NARROW": narrow}
    return load_kernels("layer_norm.c", {name: NONE if kind is None else KINDS[kind] for name, kind in kinds.items()})


def launch_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, normalised, mean and 1/deviation [R, 2]); the sum is a copy of x where there is no branch."""
    width = x.shape[-1]
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    library = _library(dtype, out_dtype, x=x.dtype, branch=None if branch is None else branch.dtype)
    total, normed = (torch.empty_like(x, dtype=kind) for kind in (dtype, out_dtype))
    statistics = torch.empty(x.numel() // width, 2)
    in_parallel(
        library.layer_norm_forward,
        x.numel() // width,
        ctypes.c_long(width),
        ctypes.c_float(eps),
        x,
        branch,
        weight.float().contiguous(),
        bias.float().contiguous(),
        total,
        normed,
        statistics,
    )
    return total, normed, statistics


def launch_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    narrow_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum, in its dtype and in narrow_dtype (or empty), of the weight and of the bias.

    The last two are added over the parts in a fixed order.
    """
    width = total.shape[-1]
    rows = total.numel() // width
    library = _library(total.dtype, grad_normed.dtype, narrow=narrow_dtype)
    grad = torch.empty_like(total)
    narrow = torch.empty_like(total, dtype=narrow_dtype) if narrow_dtype else total.new_empty(0)
    tasks = max(1, min(TASKS, rows))
    parts = torch.empty(2, tasks, width)
    in_parallel(
        library.layer_norm_backward,
        tasks,
        *(ctypes.c_long(size) for size in (rows, width)),
        None if grad_total is None else grad_total.contiguous(),
        grad_normed.contiguous(),
        total,
        weight.float().contiguous(),
        statistics,
        grad,
        narrow,
        parts,
    )
    grad_weight, grad_bias = parts.sum(dim=1).to(weight.dtype).unbind(0)
    return grad, narrow, grad_weight.clone(), grad_bias.clone()
