"""Divided attention through our own Triton kernels: launches, and registration with torch.

The kernels read the packed qkv in place and write one packed gradient; nothing is regrouped or concatenated.
Gradients of the CLS token, to which every group adds, are reduced in a fixed order without atomics, so equal
inputs give equal bits. Registered as torch.library operators: safe under torch.compile and autocast.
Axis letters: see frozen_kernels.attention.qkv_layout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from frozen_kernels.attention import triton_cls, triton_space, triton_time, triton_time_one
from frozen_kernels.attention.qkv_layout import Layout, read_layout
from frozen_kernels.attention.tiles import padded_width, tile_of
from frozen_kernels.operators import define_operator

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
MAX_FRAMES = 16
MAX_HEAD_WIDTH = 128
CLS_ROWS = 64
CHUNK = 16


def check_limits(layout: Layout) -> None:
    """Raise ValueError for sizes that the kernels do not cover."""
    if layout.frames > MAX_FRAMES:
        raise ValueError(f"num_frames: got {layout.frames} with backend 'triton'; allowed: 1 to {MAX_FRAMES}")
    if layout.head_width > MAX_HEAD_WIDTH:
        got = f"head width {layout.head_width} with backend 'triton'"
        raise ValueError(f"qkv: got {got}; allowed: 1 to {MAX_HEAD_WIDTH}")


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's own GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows_in_line(tensor: Tensor) -> Tensor:
    """The kernels step along D by one element."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _input_strides(qkv: Tensor) -> tuple[int, int, int, int]:
    """Steps of B, S, 3 and N, in elements."""
    return qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)


def _fp32(qkv: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=qkv.device)


def _cls_sums(qkv: Tensor, layout: Layout, blocks: int) -> tuple[Tensor, Tensor]:
    """Room for the CLS row's partial sums: (top, total) and weighted values of each block."""
    lead = (layout.batch, layout.heads, blocks)
    return _fp32(qkv, *lead, 2), _fp32(qkv, *lead, layout.head_width)


def _combine_cls(qkv: Tensor, layout: Layout, stats: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join the CLS row's partial sums into out[:, 0] and lse [B, N]."""
    stride_b, _, stride_c, stride_n = _input_strides(qkv)
    triton_cls.cls_combine_kernel[(layout.batch * layout.heads,)](
        qkv,
        stats,
        sums,
        out,
        lse,
        stride_b,
        stride_c,
        stride_n,
        out.stride(0),
        layout.scale,
        stats.shape[2],
        layout.heads,
        layout.head_width,
        DP=padded_width(layout.head_width),
        CHUNK=CHUNK,
        num_warps=1,
    )


def _launch_cls_partial(qkv: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The CLS row's partial sums by a pass of their own."""
    blocks = triton.cdiv(layout.tokens - 1, CLS_ROWS)
    stats, sums = _cls_sums(qkv, layout, blocks)
    triton_cls.cls_partial_kernel[(layout.batch * blocks * layout.heads,)](
        qkv,
        stats,
        sums,
        *_input_strides(qkv),
        layout.scale,
        layout.tokens - 1,
        blocks,
        layout.heads,
        layout.head_width,
        ROWS=CLS_ROWS,
        DP=padded_width(layout.head_width),
        num_warps=4,
    )
    return stats, sums


def _launch_time_forward(qkv: Tensor, layout: Layout, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the patches of out; return the CLS row's partial sums."""
    tile = tile_of("time", "forward", layout, qkv.dtype, qkv.device)
    blocks = triton.cdiv(layout.patches, tile.rows)
    stats, sums = _cls_sums(qkv, layout, blocks)
    sizes = (layout.scale, layout.patches, blocks, layout.heads, layout.head_width)
    arguments = (qkv, out, stats, sums, *_input_strides(qkv), out.stride(0), *sizes)
    grid, width = (layout.batch * blocks * layout.heads,), padded_width(layout.head_width)
    if layout.frames == 1:
        triton_time_one.one_frame_forward_kernel[grid](*arguments, ROWS=tile.rows, DP=width, num_warps=tile.warps)
    else:
        triton_time.time_forward_kernel[grid](
            *arguments,
            T=layout.frames,
            TP=triton.next_power_of_2(layout.frames),
            ROWS=tile.rows,
            DP=width,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return stats, sums


def _launch_space_forward(qkv: Tensor, layout: Layout, out: Tensor, lse: Tensor) -> None:
    """Fill the patches of out and their log2 sums of exponentials [B, N, T*P]."""
    tile = tile_of("space", "forward", layout, qkv.dtype, qkv.device)
    blocks = triton.cdiv(layout.patches, tile.rows)
    triton_space.space_forward_kernel[(layout.batch * layout.frames * layout.heads * blocks,)](
        qkv,
        out,
        lse,
        *_input_strides(qkv),
        out.stride(0),
        layout.scale,
        layout.frames,
        layout.patches,
        blocks,
        layout.heads,
        layout.head_width,
        ROWS=tile.rows,
        KEYS=tile.keys,
        DP=padded_width(layout.head_width),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _finish_cls(
    qkv: Tensor,
    layout: Layout,
    grad_out: Tensor,
    grad_qkv: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    cls_lse: Tensor,
    cls_delta: Tensor,
) -> None:
    """Write the CLS token's gradients from the blocks' parts (of query, key, value)."""
    stride_b, _, stride_c, stride_n = _input_strides(qkv)
    triton_cls.cls_finish_kernel[(layout.batch * layout.heads,)](
        qkv,
        grad_out,
        grad_qkv,
        *parts,
        cls_lse,
        cls_delta,
        stride_b,
        stride_c,
        stride_n,
        grad_out.stride(0),
        grad_qkv.stride(0),
        grad_qkv.stride(2),
        layout.scale,
        parts[0].shape[2],
        parts[1].shape[2],
        layout.heads,
        layout.head_width,
        DP=padded_width(layout.head_width),
        CHUNK=CHUNK,
        num_warps=1,
    )


def _launch_time_backward(
    qkv: Tensor, layout: Layout, grad_out: Tensor, grad_qkv: Tensor, cls_lse: Tensor, cls_delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the patches' gradients; return the blocks' parts of CLS's."""
    tile = tile_of("time", "backward", layout, qkv.dtype, qkv.device)
    blocks, width = triton.cdiv(layout.patches, tile.rows), padded_width(layout.head_width)
    shape = (layout.batch, layout.heads, blocks, layout.head_width)
    parts = (_fp32(qkv, *shape), _fp32(qkv, *shape), _fp32(qkv, *shape))
    arguments = (
        qkv,
        grad_out,
        grad_qkv,
        *parts,
        cls_lse,
        cls_delta,
        *_input_strides(qkv),
        grad_out.stride(0),
        grad_qkv.stride(0),
        grad_qkv.stride(1),
        grad_qkv.stride(2),
        layout.scale,
        layout.patches,
        blocks,
        layout.heads,
        layout.head_width,
    )
    grid = (layout.batch * blocks * layout.heads,)
    if layout.frames == 1:
        triton_time_one.one_frame_backward_kernel[grid](*arguments, ROWS=tile.rows, DP=width, num_warps=tile.warps)
    else:
        triton_time.time_backward_kernel[grid](
            *arguments,
            T=layout.frames,
            TP=triton.next_power_of_2(layout.frames),
            ROWS=tile.rows,
            DP=width,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return parts


def _launch_space_backward(
    qkv: Tensor,
    layout: Layout,
    out: Tensor,
    grad_out: Tensor,
    grad_qkv: Tensor,
    lse: Tensor,
    cls_lse: Tensor,
    cls_delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the patches' gradients (queries, then keys and values); return the blocks' parts of CLS's."""
    tile = tile_of("space", "backward", layout, qkv.dtype, qkv.device)
    blocks = triton.cdiv(layout.patches, tile.rows)
    shape = (layout.batch, layout.heads, layout.frames * blocks, layout.head_width)
    parts = (_fp32(qkv, *shape), _fp32(qkv, *shape), _fp32(qkv, *shape))
    delta = torch.empty_like(lse)
    grid = (layout.batch * layout.frames * layout.heads * blocks,)
    sizes = (layout.scale, layout.frames, layout.patches, blocks, layout.heads, layout.head_width)
    steps = (*_input_strides(qkv), grad_out.stride(0), grad_qkv.stride(0), grad_qkv.stride(1))
    options = {"ROWS": tile.rows, "KEYS": tile.keys, "DP": padded_width(layout.head_width)}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    triton_space.space_backward_query_kernel[grid](
        qkv, out, grad_out, grad_qkv, lse, delta, parts[1], parts[2], *steps, *sizes, **options
    )
    triton_space.space_backward_key_kernel[grid](
        qkv, grad_out, grad_qkv, lse, delta, cls_lse, cls_delta, parts[0], *steps, grad_qkv.stride(2), *sizes, **options
    )
    return parts


def _saved_shape(layout: Layout, axis: str) -> tuple[int, ...]:
    """Shape of the patches' log sums of exponentials: the time axis recomputes them."""
    return (0,) if axis == "time" else (layout.batch, layout.heads, layout.tokens - 1)


def launch_forward(qkv: Tensor, num_frames: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, E]; log2 sums of exponentials of the patches (space only); natural ones of CLS [B, N]."""
    layout = read_layout(qkv, num_frames, axis)
    qkv = _rows_in_line(qkv)
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    lse, cls_lse = _fp32(qkv, *_saved_shape(layout, axis)), _fp32(qkv, layout.batch, layout.heads)
    with _on_device(qkv):
        if axis == "time":
            stats, sums = _launch_time_forward(qkv, layout, out)
        else:
            _launch_space_forward(qkv, layout, out, lse)
            stats, sums = _launch_cls_partial(qkv, layout)
        _combine_cls(qkv, layout, stats, sums, out, cls_lse)
    return out, lse, cls_lse


def launch_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cls_lse: Tensor, num_frames: int, axis: str
) -> Tensor:
    """The gradient of qkv, packed and contiguous."""
    layout = read_layout(qkv, num_frames, axis)
    qkv, grad_out = _rows_in_line(qkv), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    products = grad_out[:, 0].float() * out[:, 0].float()
    cls_delta = products.view(layout.batch, layout.heads, layout.head_width).sum(dim=-1)
    with _on_device(qkv):
        if axis == "time":
            parts = _launch_time_backward(qkv, layout, grad_out, grad_qkv, cls_lse, cls_delta)
        else:
            parts = _launch_space_backward(qkv, layout, out, grad_out, grad_qkv, lse, cls_lse, cls_delta)
        _finish_cls(qkv, layout, grad_out, grad_qkv, parts, cls_lse, cls_delta)
    return grad_qkv


def _fake_forward(qkv: Tensor, num_frames: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, axis)
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    return out, _fp32(qkv, *_saved_shape(layout, axis)), _fp32(qkv, layout.batch, layout.heads)


def _fake_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cls_lse: Tensor, num_frames: int, axis: str
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_forward = define_operator("triton_attention", launch_forward, _fake_forward)
_backward = define_operator("triton_attention_backward", launch_backward, _fake_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_frames: int, axis: str) -> Tensor:
        out, lse, cls_lse = _forward(qkv, num_frames, axis)
        ctx.save_for_backward(qkv, out, lse, cls_lse)
        ctx.num_frames, ctx.axis = num_frames, axis
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _backward(grad_out, *ctx.saved_tensors, ctx.num_frames, ctx.axis), None, None


def attention_triton(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens -> [B, S, E]; fp32, bf16 or fp16; first derivatives only.

    Raises:
        ValueError: for more than 16 frames or heads wider than 128.
    """
    check_limits(layout)
    out: Tensor = _Attention.apply(qkv_BS3ND, layout.frames, axis)  # type: ignore[no-untyped-call]
    return out
