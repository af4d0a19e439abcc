"""Triton: bias and GELU. See frozen_kernels.fused.bias_gelu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frozen_kernels.fused.forms import APPROXIMATE

COLUMNS = 256
ROWS_FORWARD = 8
PROGRAMS_BACKWARD = 1024

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def gate(value, APPROXIMATE: tl.constexpr):
    """sigmoid(u) and u's derivative, u = 1.702 v (APPROXIMATE 1) or sqrt(8 / pi) (v + 0.044715 v^3) (2)."""
    if APPROXIMATE == 1:
        slope = value * 0.0 + 1.702
        power = 1.702 * value
    else:
        slope = 1.5957691216 + 0.2140644488 * value * value
        power = value * (1.5957691216 + 0.0713548163 * value * value)
    return 1.0 / (1.0 + tl.exp(-power)), slope


@triton.jit
def forward_kernel(x, bias, out, rows, D, APPROXIMATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of ROWS x COLUMNS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < D)
    offsets = row[:, None] * D + column[None, :]
    shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    if APPROXIMATE:
        share, _ = gate(value, APPROXIMATE)
    else:
        share = 0.5 * (1.0 + tl.erf(value * SQRT_HALF))
    tl.store(out + offsets, value * share, mask=inside)


@triton.jit
def backward_kernel(
    grad_out, x, bias, grad, parts, rows, D, APPROXIMATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A column block over ROWS rows, one after the other: gradient of x, and the block's part of the bias's."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    part = tl.zeros([COLUMNS], dtype=tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = column < tl.where(row < rows, D, 0)
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32) + shift
        upper = tl.load(grad_out + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if APPROXIMATE:
            share, inner = gate(value, APPROXIMATE)
            slope = share * (1.0 + value * inner * (1.0 - share))
        else:
            share = 0.5 * (1.0 + tl.erf(value * SQRT_HALF))
            slope = share + value * INVERSE_SQRT_2PI * tl.exp(-0.5 * value * value)
        result = upper * slope
        tl.store(grad + row * D + column, result, mask=inside)
        part += result
    tl.store(parts + tl.program_id(0) * D + column, part, mask=column < D)


def launch_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    width = x.shape[-1]
    rows = x.numel() // width
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = (triton.cdiv(rows, ROWS_FORWARD), triton.cdiv(width, COLUMNS))
    sizes = {"APPROXIMATE": APPROXIMATE[approximate], "ROWS": ROWS_FORWARD, "COLUMNS": COLUMNS}
    forward_kernel[grid](x, bias.contiguous(), out, rows, width, **sizes, num_warps=4)
    return out


def launch_backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Gradients of x and the bias; the bias's is added over programs in a fixed order."""
    width = x.shape[-1]
    rows = x.numel() // width
    x = x.contiguous()
    per_program = triton.next_power_of_2(triton.cdiv(rows, PROGRAMS_BACKWARD))
    programs = triton.cdiv(rows, per_program)
    grad = torch.empty_like(x)
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    grid = (programs, triton.cdiv(width, COLUMNS))
    backward_kernel[grid](
        grad_out.contiguous(),
        x,
        bias.contiguous(),
        grad,
        parts,
        rows,
        width,
        APPROXIMATE=APPROXIMATE[approximate],
        ROWS=per_program,
        COLUMNS=COLUMNS,
        num_warps=2,
    )
    return grad, parts.sum(dim=0).to(bias.dtype)
