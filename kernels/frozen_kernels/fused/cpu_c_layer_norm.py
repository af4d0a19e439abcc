"""C form of frozen_kernels.fused.layer_norm, for CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from frozen_kernels.cpu_c.library import KINDS, in_parallel, load_kernels

TASKS = 32
"""Number of parts of the rows in the backward pass; each part has its own sums of the weight's and bias's gradients."""
NONE = -1


def _library(
    stream: torch.dtype,
    normed: torch.dtype,
    *,
    x: torch.dtype | None = None,
    branch: torch.dtype | None = None,
    grad_branch: torch.dtype | None = None,
) -> ctypes.CDLL:
    kinds = {"X": x or stream, "BRANCH": branch, "STREAM": stream, "NORMED": normed, "GRAD_BRANCH": grad_branch}
    return load_kernels("layer_norm.c", {name: NONE if kind is None else KINDS[kind] for name, kind in kinds.items()})


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (the sum, empty without keep_sum; the normalised sum; mean and 1 / standard deviation [R, 2])."""
    width = x.shape[-1]
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    library = _library(dtype, out_dtype, x=x.dtype, branch=None if branch is None else branch.dtype)
    total = torch.empty_like(x, dtype=dtype) if keep_sum else x.new_empty(0, dtype=dtype)
    normed = torch.empty_like(x, dtype=out_dtype)
    statistics = torch.empty(x.numel() // width, 2)
    in_parallel(
        library.layer_norm_forward,
        x.numel() // width,
        ctypes.c_long(width),
        ctypes.c_float(eps),
        x,
        branch,
        None if branch_bias is None else branch_bias.float().contiguous(),
        weight.float().contiguous(),
        bias.float().contiguous(),
        total if keep_sum else None,
        normed,
        statistics,
    )
    return total, normed, statistics


def launch_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
    through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See triton_layer_norm.launch_backward; the last three results are added over the parts in a fixed order."""
    width = stream.shape[-1]
    rows = stream.numel() // width
    stream = stream.contiguous()
    recomputed = None if branch is None else branch.dtype
    library = _library(stream.dtype, grad_normed.dtype, branch=recomputed, grad_branch=branch_dtype)
    grad = torch.empty_like(stream)
    grad_branch = torch.empty_like(stream, dtype=branch_dtype) if branch_dtype else stream.new_empty(0)
    tasks = max(1, min(TASKS, rows))
    parts = torch.empty(2 + sum_branch, tasks, width)
    in_parallel(
        library.layer_norm_backward,
        tasks,
        *(ctypes.c_long(size) for size in (rows, width)),
        *(ctypes.c_int(flag) for flag in (sum_branch, through)),
        None if grad_stream is None else grad_stream.contiguous(),
        grad_normed.contiguous(),
        stream,
        None if branch is None else branch.contiguous(),
        None if branch_bias is None else branch_bias.float().contiguous(),
        weight.float().contiguous(),
        statistics,
        grad,
        grad_branch,
        parts,
    )
    sums = parts.sum(dim=1)
    grad_weight, grad_bias = (part.to(weight.dtype, copy=True) for part in sums[:2].unbind(0))
    return grad, grad_branch, grad_weight, grad_bias, sums[2].clone() if sum_branch else sums.new_empty(0)
