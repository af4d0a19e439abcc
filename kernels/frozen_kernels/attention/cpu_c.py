"""Divided attention for CPUs by C kernels (frozen_kernels.cpu_c.library).

The time axis is one pass over the packed qkv, forward and backward, which accumulates in fp32 for every input dtype. It
does not regroup tokens and saves only the CLS row and its log-sum-exp for the backward pass. The space axis uses BLAS
matrix products over pieces of as many frames as fit in the cache. C kernels gather the operands, scatter the results
and compute the CLS row. The probabilities are saved in the input's dtype. Gradients do not depend on the number of
threads.

Axis letters: see qkv_layout; G = B*T*N groups of the space axis, R queries per group: P, or 1 + P at one frame, where
CLS belongs to the group.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frozen_kernels.attention.qkv_layout import Layout, read_layout
from frozen_kernels.cpu_c.library import KINDS, in_parallel, load_kernels
from frozen_kernels.operators import define_operator

CHUNKS = 8
"""Number of tasks per clip on the time axis; each task handles a range of positions."""
PIECE_BYTES = 1 << 20
"""Space axis: largest size of the queries, keys, values and probabilities of the frames that are processed together."""


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("frames", "positions", "heads", "chunks")]
    _fields_ += [("scale", ctypes.c_float)]


def _cls_tensors(qkv: Tensor, layout: Layout, chunks: int) -> tuple[Tensor, Tensor]:
    """Allocate the CLS row's partial results [B*chunks, N, D+2], and its output and log-sum-exp [B, N, D+1]."""
    running = (layout.batch * chunks, layout.heads, layout.head_width + 2)
    state = (layout.batch, layout.heads, layout.head_width + 1)
    return qkv.new_empty(running, dtype=torch.float32), qkv.new_empty(state, dtype=torch.float32)


# Time axis ---------------------------------------------------------------------------------------------------


def _open_time(qkv: Tensor, layout: Layout) -> tuple[ctypes.CDLL, _Sizes]:
    macros = {"KIND": KINDS[qkv.dtype], "FRAMES": layout.frames, "WIDTH": layout.head_width}
    chunks = min(CHUNKS, layout.patches)
    sizes = _Sizes(layout.frames, layout.patches, layout.heads, chunks, layout.scale)
    return load_kernels("attention_time.c", macros), sizes


def _time_forward(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Output [B, S, E], and the CLS row with its log-sum-exp in fp32 [B, N, D+1]."""
    layout = read_layout(qkv, num_frames, "time")
    library, sizes = _open_time(qkv, layout)
    qkv = qkv.contiguous()
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    running, state = _cls_tensors(qkv, layout, sizes.chunks)
    in_parallel(library.time_forward, layout.batch * sizes.chunks, sizes, qkv, out, running)
    in_parallel(library.cls_forward, layout.batch, sizes, qkv, out, running, state)
    return out, state


def _time_backward(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
    """The gradient of qkv, packed as qkv is."""
    layout = read_layout(qkv, num_frames, "time")
    library, sizes = _open_time(qkv, layout)
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    tasks = layout.batch * sizes.chunks
    sums = qkv.new_empty(tasks, layout.heads, 3, layout.head_width, dtype=torch.float32)
    in_parallel(library.time_backward, tasks, sizes, qkv, grad_out, state, grad_qkv, sums)
    in_parallel(library.cls_backward, layout.batch, sizes, qkv, grad_out, state, grad_qkv, sums)
    return grad_qkv


def _fake_time_forward(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, "time")
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), _cls_tensors(qkv, layout, 1)[1]


def _fake_time_backward(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


time_forward = define_operator("cpu_c_time", _time_forward, _fake_time_forward, dispatch_key="CPU")
time_backward = define_operator("cpu_c_time_backward", _time_backward, _fake_time_backward, dispatch_key="CPU")


class _TimeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_frames: int) -> Tensor:
        out, state = time_forward(qkv, num_frames)
        ctx.save_for_backward(qkv, state)
        ctx.num_frames = num_frames
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return time_backward(grad_out, *ctx.saved_tensors, ctx.num_frames), None


# Space axis --------------------------------------------------------------------------------------------------


def _open_space(qkv: Tensor, layout: Layout) -> tuple[ctypes.CDLL, _Sizes]:
    macros = {"KIND": KINDS[qkv.dtype], "WIDTH": layout.head_width}
    sizes = _Sizes(layout.frames, layout.patches, layout.heads, layout.frames, layout.scale)
    return load_kernels("attention_space.c", macros), sizes


def _queries(layout: Layout) -> int:
    """Return R, the number of queries per group."""
    return layout.patches + (layout.frames == 1)


def _frames_per_piece(qkv: Tensor, layout: Layout) -> int:
    """Return the number of frames that PIECE_BYTES allows, at least one."""
    keys = layout.patches + 1
    frame_bytes = layout.heads * keys * (keys + 3 * layout.head_width) * qkv.element_size()
    return max(1, min(PIECE_BYTES // frame_bytes, layout.batch * layout.frames))


def _pieces(qkv: Tensor, layout: Layout) -> Iterator[tuple[ctypes.c_long, slice]]:
    """Yield pieces of the batch's frames: the index of the first frame, and the slice of the piece's groups."""
    count, frames = _frames_per_piece(qkv, layout), layout.batch * layout.frames
    for first in range(0, frames, count):
        yield ctypes.c_long(first), slice(first * layout.heads, min(first + count, frames) * layout.heads)


def _kept(qkv: Tensor, layout: Layout, keep: bool) -> tuple[Tensor, Tensor]:
    """Allocate the probabilities [G, R, 1+P], empty unless keep, and the CLS row's state, empty at one frame."""
    groups = layout.batch * layout.frames * layout.heads if keep else 0
    state = _cls_tensors(qkv, layout, 1)[1] if layout.frames > 1 else qkv.new_empty(0, dtype=torch.float32)
    return qkv.new_empty(groups, _queries(layout), layout.patches + 1), state


def _matrices(qkv: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate a piece's queries [groups, R, D], keys and values [groups, 1+P, D]; all pieces reuse these buffers."""
    groups = _frames_per_piece(qkv, layout) * layout.heads
    keys = (groups, layout.patches + 1, layout.head_width)
    return qkv.new_empty(groups, _queries(layout), layout.head_width), qkv.new_empty(keys), qkv.new_empty(keys)


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return scale * left @ right, written to out if given."""
    unread = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(unread, left, right, beta=0, alpha=scale, out=out)


def _space_forward(qkv: Tensor, num_frames: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, E]; with keep the probabilities; at several frames the CLS row's state (see _kept)."""
    layout = read_layout(qkv, num_frames, "space")
    library, sizes = _open_space(qkv, layout)
    qkv = qkv.contiguous()
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    saved, state = _kept(qkv, layout, keep)
    running = _cls_tensors(qkv, layout, layout.frames)[0] if layout.frames > 1 else None
    room = _matrices(qkv, layout)
    with torch.autocast("cpu", enabled=False):
        for first, groups in _pieces(qkv, layout):
            tasks = groups.stop - groups.start
            query, key, value = (matrix[:tasks] for matrix in room)
            in_parallel(library.space_gather, tasks, sizes, first, qkv, query, key, value, running)
            scores = _scaled_product(query, key.transpose(1, 2), layout.scale)
            probabilities = torch.softmax(scores, dim=-1, out=saved[groups] if keep else None)
            torch.bmm(probabilities, value, out=query)
            in_parallel(library.space_rows, tasks, sizes, first, out, query, ctypes.c_long(0))
    if running is not None:
        in_parallel(library.cls_forward, layout.batch, sizes, qkv, out, running, state)
    return out, saved, state


def _space_backward(grad_out: Tensor, qkv: Tensor, saved: Tensor, state: Tensor, num_frames: int) -> Tensor:
    """The gradient of qkv, packed as qkv is."""
    layout = read_layout(qkv, num_frames, "space")
    library, sizes = _open_space(qkv, layout)
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    room, grad_room = _matrices(qkv, layout), _matrices(qkv, layout)
    grad_qkv = torch.empty_like(qkv)
    sums = qkv.new_empty(layout.batch * layout.frames, layout.heads, 3, layout.head_width, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        for first, groups in _pieces(qkv, layout):
            tasks, probabilities = groups.stop - groups.start, saved[groups]
            query, key, value = (matrix[:tasks] for matrix in room)
            grad, grad_key, grad_value = (matrix[:tasks] for matrix in grad_room)
            in_parallel(library.space_gather, tasks, sizes, first, qkv, query, key, value, None)
            in_parallel(library.space_rows, tasks, sizes, first, grad_out, grad, ctypes.c_long(1))
            torch.bmm(probabilities.transpose(1, 2), grad, out=grad_value)
            grad_probabilities = torch.bmm(grad, value.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, qkv.dtype)
            _scaled_product(grad_scores, key, layout.scale, out=grad)
            _scaled_product(grad_scores.transpose(1, 2), query, layout.scale, out=grad_key)
            gradients = (grad, grad_key, grad_value)
            in_parallel(library.space_scatter, tasks, sizes, first, *gradients, qkv, grad_out, state, grad_qkv, sums)
    if layout.frames > 1:
        in_parallel(library.cls_backward, layout.batch, sizes, qkv, grad_out, state, grad_qkv, sums)
    return grad_qkv


def _fake_space_forward(qkv: Tensor, num_frames: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, "space")
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), *_kept(qkv, layout, keep)


def _fake_space_backward(grad_out: Tensor, qkv: Tensor, saved: Tensor, state: Tensor, num_frames: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


space_forward = define_operator("cpu_c_space", _space_forward, _fake_space_forward, dispatch_key="CPU")
space_backward = define_operator("cpu_c_space_backward", _space_backward, _fake_space_backward, dispatch_key="CPU")


class _SpaceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_frames: int, keep: bool) -> Tensor:
        out, saved, state = space_forward(qkv, num_frames, keep)
        ctx.save_for_backward(qkv, saved, state)
        ctx.num_frames = num_frames
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return space_backward(grad_out, *ctx.saved_tensors, ctx.num_frames), None, None


def attention_cpu_c(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens on a CPU -> [B, S, E]; fp32, bf16 or fp16; first derivatives only."""
    out: Tensor
    if axis == "time":
        out = _TimeAttention.apply(qkv_BS3ND, layout.frames)  # type: ignore[no-untyped-call]
        return out
    keep = torch.is_grad_enabled() and qkv_BS3ND.requires_grad
    out = _SpaceAttention.apply(qkv_BS3ND, layout.frames, keep)  # type: ignore[no-untyped-call]
    return out
