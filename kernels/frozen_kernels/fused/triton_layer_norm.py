"""Triton: residual sum and LayerNorm; a program holds whole rows in registers. See frozen_kernels.fused.layer_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_FORWARD = 4
PROGRAMS_BACKWARD = 1024


@triton.jit
def forward_kernel(
    x,
    branch,
    weight,
    bias,
    total,
    normed,
    statistics,
    rows,
    D,
    eps,
    HAS_BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """ROWS rows: sum, mean and 1/deviation in fp32, normalised row."""
    column = tl.arange(0, DP)
    wide = column < D
    scale = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = column < tl.where(row < rows, D, 0)
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            value += tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
            stored = value.to(total.dtype.element_ty)
            tl.store(total + row * D + column, stored, mask=inside)
            value = stored.to(tl.float32)
        mean = tl.sum(value, axis=0) / D
        centred = tl.where(wide, value - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
        tl.store(normed + row * D + column, centred * inverse * scale + shift, mask=inside)
        tl.store(statistics + row * 2, mean, mask=row < rows)
        tl.store(statistics + row * 2 + 1, inverse, mask=row < rows)


@triton.jit
def backward_kernel(
    grad_total,
    grad_normed,
    total,
    weight,
    statistics,
    grad,
    narrow,
    weight_parts,
    bias_parts,
    rows,
    D,
    HAS_TOTAL: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """ROWS rows: the sum's gradient in one or two dtypes, and the block's parts of the weight's and bias's."""
    column = tl.arange(0, DP)
    wide = column < D
    scale = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32)
    weight_part = tl.zeros([DP], dtype=tl.float32)
    bias_part = tl.zeros([DP], dtype=tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = column < tl.where(row < rows, D, 0)
        upper = tl.load(grad_normed + row * D + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + row * D + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row * 2, mask=row < rows, other=0.0)
        inverse = tl.load(statistics + row * 2 + 1, mask=row < rows, other=0.0)
        unit = tl.where(wide, (value - mean) * inverse, 0.0)
        scaled = upper * scale
        along = tl.sum(scaled * unit, axis=0) / D
        level = tl.sum(scaled, axis=0) / D
        result = (scaled - level - unit * along) * inverse
        if HAS_TOTAL:
            result += tl.load(grad_total + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + row * D + column, result, mask=inside)
        if HAS_NARROW:
            tl.store(narrow + row * D + column, result, mask=inside)
        weight_part += upper * unit
        bias_part += upper
    tl.store(weight_parts + tl.program_id(0) * D + column, weight_part, mask=wide)
    tl.store(bias_parts + tl.program_id(0) * D + column, bias_part, mask=wide)


def _warps(padded: int) -> int:
    return min(8, max(1, padded // 256))


def launch_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, normalised, mean and 1/deviation [R, 2]); the sum is a copy of x where there is no branch."""
    width = x.shape[-1]
    rows, padded = x.numel() // width, triton.next_power_of_2(width)
    x = x.contiguous()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = x.clone() if branch is None else torch.empty_like(x, dtype=dtype)
    normed = torch.empty_like(x, dtype=out_dtype)
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    addend = x if branch is None else branch.contiguous()
    forward_kernel[(triton.cdiv(rows, ROWS_FORWARD),)](
        x,
        addend,
        weight.contiguous(),
        bias.contiguous(),
        total,
        normed,
        statistics,
        rows,
        width,
        eps,
        HAS_BRANCH=branch is not None,
        ROWS=ROWS_FORWARD,
        DP=padded,
        num_warps=_warps(padded),
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

    The last two are added over programs in a fixed order.
    """
    width = total.shape[-1]
    rows, padded = total.numel() // width, triton.next_power_of_2(width)
    per_program = triton.next_power_of_2(triton.cdiv(rows, PROGRAMS_BACKWARD))
    programs = triton.cdiv(rows, per_program)
    grad = torch.empty_like(total)
    narrow = torch.empty_like(total, dtype=narrow_dtype) if narrow_dtype else total.new_empty(0)
    parts = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
    backward_kernel[(programs,)](
        total if grad_total is None else grad_total.contiguous(),
        grad_normed.contiguous(),
        total,
        weight.contiguous(),
        statistics,
        grad,
        narrow,
        parts[0],
        parts[1],
        rows,
        width,
        HAS_TOTAL=grad_total is not None,
        HAS_NARROW=narrow_dtype is not None,
        ROWS=per_program,
        DP=padded,
        num_warps=_warps(padded),
    )
    grad_weight, grad_bias = parts.sum(dim=1).to(weight.dtype).unbind(0)
    return grad, narrow, grad_weight.clone(), grad_bias.clone()
