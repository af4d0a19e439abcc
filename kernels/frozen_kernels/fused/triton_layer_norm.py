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
    branch_bias,
    weight,
    bias,
    total,
    normed,
    statistics,
    rows,
    D,
    eps,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """ROWS rows: sum, mean and 1/deviation in fp32, normalised row."""
    column = tl.arange(0, DP)
    wide = column < D
    scale = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)
    if HAS_BIAS:
        extra = tl.load(branch_bias + column, mask=wide, other=0.0).to(tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = column < tl.where(row < rows, D, 0)
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            value += tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += extra
        if KEEP_SUM:
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
    grad_stream,
    grad_normed,
    stream,
    branch,
    branch_bias,
    weight,
    statistics,
    grad,
    grad_branch,
    weight_parts,
    bias_parts,
    branch_parts,
    rows,
    D,
    HAS_STREAM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BRANCH_APART: tl.constexpr,
    SUM_BRANCH: tl.constexpr,
    THROUGH: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """ROWS rows: the stream's and the branch's gradients, and the program's parts of the weight's and the biases'.

    THROUGH: the stream's own gradient is none of the branch's. HAS_BRANCH: the sum is computed again.
    """
    column = tl.arange(0, DP)
    wide = column < D
    scale = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32)
    weight_part = tl.zeros([DP], dtype=tl.float32)
    bias_part = tl.zeros([DP], dtype=tl.float32)
    branch_part = tl.zeros([DP], dtype=tl.float32)
    if HAS_BIAS:
        extra = tl.load(branch_bias + column, mask=wide, other=0.0).to(tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = column < tl.where(row < rows, D, 0)
        upper = tl.load(grad_normed + row * D + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(stream + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            value += tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += extra
        mean = tl.load(statistics + row * 2, mask=row < rows, other=0.0)
        inverse = tl.load(statistics + row * 2 + 1, mask=row < rows, other=0.0)
        unit = tl.where(wide, (value - mean) * inverse, 0.0)
        scaled = upper * scale
        along = tl.sum(scaled * unit, axis=0) / D
        level = tl.sum(scaled, axis=0) / D
        result = (scaled - level - unit * along) * inverse
        if HAS_STREAM and not THROUGH:
            result += tl.load(grad_stream + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if BRANCH_APART:
            tl.store(grad_branch + row * D + column, result, mask=inside)
        if SUM_BRANCH:
            branch_part += tl.where(inside, result, 0.0)
        if HAS_STREAM and THROUGH:
            result += tl.load(grad_stream + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + row * D + column, result, mask=inside)
        weight_part += upper * unit
        bias_part += upper
    tl.store(weight_parts + tl.program_id(0) * D + column, weight_part, mask=wide)
    tl.store(bias_parts + tl.program_id(0) * D + column, bias_part, mask=wide)
    if SUM_BRANCH:
        tl.store(branch_parts + tl.program_id(0) * D + column, branch_part, mask=wide)


def _warps(padded: int) -> int:
    return min(8, max(1, padded // 256))


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
    """(sum, or nothing without keep_sum; normalised; mean and 1/deviation [R, 2])."""
    width = x.shape[-1]
    rows, padded = x.numel() // width, triton.next_power_of_2(width)
    x = x.contiguous()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = torch.empty_like(x, dtype=dtype) if keep_sum else x.new_empty(0, dtype=dtype)
    normed = torch.empty_like(x, dtype=out_dtype)
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    forward_kernel[(triton.cdiv(rows, ROWS_FORWARD),)](
        x,
        x if branch is None else branch.contiguous(),
        weight if branch_bias is None else branch_bias.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        total,
        normed,
        statistics,
        rows,
        width,
        eps,
        HAS_BRANCH=branch is not None,
        HAS_BIAS=branch_bias is not None,
        KEEP_SUM=keep_sum,
        ROWS=ROWS_FORWARD,
        DP=padded,
        num_warps=_warps(padded),
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
    """Gradients of the stream, the branch (or nothing), the weight, the bias and the branch's bias (or nothing).

    Args:
        grad_stream: of the sum that was kept, or with through of the x that was handed through.
        grad_normed: of the normalised sum.
        stream: the sum, or with through x.
        branch: with through, what was added to x.
        branch_bias: with through, what was added to the branch.
        weight: LayerNorm weight.
        statistics: mean and 1/deviation.
        branch_dtype: of the branch's gradient; None: it is the stream's.
        sum_branch: reduce the branch's gradient to that of its bias.
        through: grad_stream is none of the branch's gradient.

    The last three are added over programs in a fixed order.
    """
    width = stream.shape[-1]
    rows, padded = stream.numel() // width, triton.next_power_of_2(width)
    per_program = triton.next_power_of_2(triton.cdiv(rows, PROGRAMS_BACKWARD))
    programs = triton.cdiv(rows, per_program)
    stream = stream.contiguous()
    grad = torch.empty_like(stream)
    grad_branch = torch.empty_like(stream, dtype=branch_dtype) if branch_dtype else stream.new_empty(0)
    parts = torch.empty(2 + sum_branch, programs, width, dtype=torch.float32, device=stream.device)
    backward_kernel[(programs,)](
        stream if grad_stream is None else grad_stream.contiguous(),
        grad_normed.contiguous(),
        stream,
        stream if branch is None else branch.contiguous(),
        weight if branch_bias is None else branch_bias.contiguous(),
        weight.contiguous(),
        statistics,
        grad,
        grad_branch,
        parts[0],
        parts[1],
        parts[-1],
        rows,
        width,
        HAS_STREAM=grad_stream is not None,
        HAS_BRANCH=branch is not None,
        HAS_BIAS=branch_bias is not None,
        BRANCH_APART=branch_dtype is not None,
        SUM_BRANCH=sum_branch,
        THROUGH=through,
        ROWS=per_program,
        DP=padded,
        num_warps=_warps(padded),
    )
    sums = parts.sum(dim=1)
    grad_weight, grad_bias = (part.to(weight.dtype, copy=True) for part in sums[:2].unbind(0))
    return grad, grad_branch, grad_weight, grad_bias, sums[2].clone() if sum_branch else sums.new_empty(0)
