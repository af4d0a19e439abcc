"""Divided attention for CPUs by C kernels (frozen_kernels.native_library).

The time axis is one pass over the packed qkv, forward and backward, in fp32 registers whatever the input's dtype:
nothing is regrouped, nothing but the CLS row and its log-sum-exp is kept for the backward pass, and gradients do not
depend on the number of threads. The space axis is made of matrix products that a BLAS does best: it is `batched`'s.

Axis letters: see frozen_kernels.layout.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from frozen_kernels.attention_batched import attention_batched
from frozen_kernels.layout import Layout, read_layout
from frozen_kernels.native_library import KINDS, in_parallel, load_native

CHUNKS = 8
"""Ranges of positions per clip: what threads share out."""


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("positions", "heads", "chunks")] + [("scale", ctypes.c_float)]


def _open(qkv: Tensor, layout: Layout) -> tuple[ctypes.CDLL, _Sizes]:
    macros = {"KIND": KINDS[qkv.dtype], "FRAMES": layout.frames, "WIDTH": layout.head_width}
    chunks = min(CHUNKS, layout.patches)
    return load_native("attention_time.c", macros), _Sizes(layout.patches, layout.heads, chunks, layout.scale)


@torch.library.custom_op("frozen_kernels::native_time", mutates_args=(), device_types="cpu")
def time_forward(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Output [B, S, E], and the CLS row with its log-sum-exp in fp32 [B, N, D+1]."""
    layout = read_layout(qkv, num_frames, "time")
    library, sizes = _open(qkv, layout)
    qkv = qkv.contiguous()
    out = qkv.new_empty(layout.batch, layout.tokens, layout.width)
    tasks = layout.batch * sizes.chunks
    running = qkv.new_empty(tasks, layout.heads, layout.head_width + 2, dtype=torch.float32)
    state = qkv.new_empty(layout.batch, layout.heads, layout.head_width + 1, dtype=torch.float32)
    in_parallel(library.time_forward, tasks, sizes, qkv, out, running)
    in_parallel(library.time_forward_cls, layout.batch, sizes, qkv, out, running, state)
    return out, state


@torch.library.custom_op("frozen_kernels::native_time_backward", mutates_args=(), device_types="cpu")
def time_backward(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
    """The gradient of qkv, packed as qkv is."""
    layout = read_layout(qkv, num_frames, "time")
    library, sizes = _open(qkv, layout)
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    tasks = layout.batch * sizes.chunks
    sums = qkv.new_empty(tasks, layout.heads, 3, layout.head_width, dtype=torch.float32)
    in_parallel(library.time_backward, tasks, sizes, qkv, grad_out, state, grad_qkv, sums)
    in_parallel(library.time_backward_cls, layout.batch, sizes, qkv, grad_out, state, grad_qkv, sums)
    return grad_qkv


@time_forward.register_fake
def _(qkv: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, "time")
    state = qkv.new_empty(layout.batch, layout.heads, layout.head_width + 1, dtype=torch.float32)
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), state


@time_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, state: Tensor, num_frames: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_frames = inputs
    ctx.save_for_backward(qkv, output[1])


def _differentiate(ctx: Any, grad_out: Tensor, unused: Tensor) -> tuple[Tensor, None]:
    return time_backward(grad_out, *ctx.saved_tensors, ctx.num_frames), None


time_forward.register_autograd(_differentiate, setup_context=_save)


def attention_native(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens on a CPU -> [B, S, E]; fp32, bf16 or fp16; first derivatives only."""
    if axis == "space":
        return attention_batched(qkv_BS3ND, layout, axis)
    return time_forward(qkv_BS3ND, layout.frames)[0]
