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

from frozen_kernels.attention.qkv_layout import Layout, read_layout
from frozen_kernels.cpu_c.library import KINDS, in_parallel, load_kernels

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


@torch.library.custom_op("frozen_kernels::cpu_c_time", mutates_args=(), device_types="cpu")
def time_forward(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Output [B, S, E], and the CLS row with its log-sum-exp in fp32 [B, N, D+1]."""
    layout = read_layout(qkv, num_frames, "time")
    library, sizes = _open_time(qkv, layout)
    qkv = qkv.contiguous()
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    running, state = _cls_tensors(qkv, layout, sizes.chunks)
    in_parallel(library.time_forward, layout.batch * sizes.chunks, sizes, qkv, out, running)
    in_parallel(library.cls_forward, layout.batch, sizes, qkv, out, running, state)
    return out, state


@torch.library.custom_op("frozen_kernels::cpu_c_time_backward", mutates_args=(), device_types="cpu")
def time_backward(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
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


@time_forward.register_fake
def _(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, "time")
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), _cls_tensors(qkv, layout, 1)[1]


@time_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_time(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_frames = inputs
    ctx.set_materialize_grads(False)  # the saved state has no gradient
    ctx.save_for_backward(qkv, output[1])


def _differentiate_time(ctx: Any, grad_out: Tensor, unused: None) -> tuple[Tensor, None]:
    return time_backward(grad_out, *ctx.saved_tensors, ctx.num_frames), None


time_forward.register_autograd(_differentiate_time, setup_context=_save_time)


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


@torch.library.custom_op("frozen_kernels::cpu_c_space", mutates_args=(), device_types="cpu")
def space_forward(qkv: Tensor, num_frames: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
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


@torch.library.custom_op("frozen_kernels::cpu_c_space_backward", mutates_args=(), device_types="cpu")
def space_backward(grad_out: Tensor, qkv: Tensor, saved: Tensor, state: Tensor, num_frames: int) -> Tensor:
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


@space_forward.register_fake
def _(qkv: Tensor, num_frames: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, "space")
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), *_kept(qkv, layout, keep)


@space_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, saved: Tensor, state: Tensor, num_frames: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_space(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, ctx.num_frames, keep = inputs
    assert keep, "a differentiated call keeps its probabilities"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, output[1], output[2])


def _differentiate_space(ctx: Any, grad_out: Tensor, *unused: None) -> tuple[Tensor, None, None]:
    return space_backward(grad_out, *ctx.saved_tensors, ctx.num_frames), None, None


space_forward.register_autograd(_differentiate_space, setup_context=_save_space)


def attention_cpu_c(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens on a CPU -> [B, S, E]; fp32, bf16 or fp16; first derivatives only."""
    if axis == "time":
        return time_forward(qkv_BS3ND, layout.frames)[0]
    keep = torch.is_grad_enabled() and qkv_BS3ND.requires_grad
    return space_forward(qkv_BS3ND, layout.frames, keep)[0]
