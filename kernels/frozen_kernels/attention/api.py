"""divided_attention: the one entry point, and the table of its backends.

Axis letters: see frozen_kernels.attention.qkv_layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from frozen_kernels.attention.qkv_layout import Layout, read_layout
from frozen_kernels.attention.selection import choose_backend, default_backend
from frozen_kernels.availability import BACKEND_NAMES, unavailable_backends, why_not


@dataclass(frozen=True)
class Backend:
    """One way to compute divided attention: all tokens, and the CLS row alone."""

    full: Callable[[Tensor, Layout, str], Tensor]
    cls_only: Callable[[Tensor, Layout], Tensor]


_FUNCTIONS = {
    "reference": (("reference", "attention_reference"), ("reference", "cls_reference")),
    "sdpa": (("sdpa", "attention_sdpa"), ("sdpa", "cls_sdpa")),
    "cpu_c": (("cpu_c", "attention_cpu_c"), ("reference", "cls_reference")),
    "xformers": (("xformers", "attention_xformers"), ("xformers", "cls_xformers")),
    "triton": (("triton", "attention_triton"), ("reference", "cls_reference")),
}
"""Backend -> (module, function) for all tokens and for CLS alone; imported at first use."""

_loaded: dict[str, Backend] = {}


def add_backend(name: str, backend: Backend) -> None:
    """Register an attention backend under a name. `auto` never chooses it.

    Raises:
        ValueError: if the name is taken by another backend.
    """
    if name in BACKEND_NAMES or _loaded.get(name, backend) != backend:
        raise ValueError(f"backend: got {name!r}; allowed: a name that is not in use")
    _loaded[name] = backend


def load_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Import a backend.

    Raises:
        ValueError: if the name is unknown or the backend cannot run on the device in the dtype, with the reason.
    """
    if name not in BACKEND_NAMES and name in _loaded:
        return _loaded[name]
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend: got {name!r}; allowed: auto, {', '.join([*BACKEND_NAMES, *_loaded])}")
    reason = why_not(name, device, dtype)
    if reason:
        usable = [other for other in BACKEND_NAMES if other not in unavailable_backends(device, dtype)]
        raise ValueError(f"backend: got {name!r}, which cannot run here: {reason}; allowed: auto, {', '.join(usable)}")
    if name not in _loaded:
        full, cls_only = (
            getattr(import_module(f"frozen_kernels.attention.{module}"), function)
            for module, function in _FUNCTIONS[name]
        )
        _loaded[name] = Backend(full, cls_only)
    return _loaded[name]


def resolve_backend(backend: str, qkv_BS3ND: Tensor, num_frames: int, axis: str, *, whole_batch: bool = False) -> str:
    """Return the backend that runs: `backend` itself, or the choice of `auto`, which measures a new case.

    On CUDA, `auto` measures a batch rounded up to a power of two and cut to 32,768 tokens, so that many batch sizes
    need few measurements. With whole_batch, it measures the tensor's own batch.

    Under torch.compile, `auto` cannot measure and returns the device's default. To use the measured choice, call this
    with a tensor of the stage's shape before compiling.
    """
    layout = read_layout(qkv_BS3ND, num_frames, axis)
    if backend != "auto":
        return backend
    if qkv_BS3ND.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _deterministic_backend(backend)
    if torch.compiler.is_compiling() or (qkv_BS3ND.is_cuda and torch.cuda.is_current_stream_capturing()):
        return default_backend(qkv_BS3ND.device, qkv_BS3ND.dtype)
    return choose_backend(qkv_BS3ND, layout, axis, _compute, whole_batch=whole_batch)


def _compute(backend: str, qkv_BS3ND: Tensor, num_frames: int, axis: str) -> Tensor:
    return divided_attention(qkv_BS3ND, num_frames, axis, backend=backend)


def divided_attention(
    qkv_BS3ND: Tensor,
    num_frames: int,
    axis: str,
    *,
    backend: str = "auto",
    cls_only: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Attention of Frozen in Time's space-time blocks (section 3.2 of the paper): over time or over space.

    The CLS query attends to all S tokens. A patch query attends to CLS and to its group: the same position in
    all frames (axis "time", T+1 keys) or its own frame (axis "space", P+1 keys). Scores are scaled by D^-0.5.

    Args:
        qkv_BS3ND: [B, S, 3, N, D], queries, keys and values of S = 1 + num_frames * P tokens, CLS first, then
            frame by frame; fp32, bf16 or fp16, any strides.
        num_frames: T.
        axis: "time" or "space".
        backend: "auto" or one of reference, sdpa, cpu_c, xformers, triton.
        cls_only: compute the CLS row alone.
        deterministic: compute gradients without atomic additions, so that they are reproducible. On CUDA, `auto` then
            chooses triton, and sdpa and xformers raise. Every backend is deterministic on a CPU.
            torch.use_deterministic_algorithms turns this on as well.

    Returns:
        [B, S, E] in qkv's dtype, E = N*D; [B, 1, E] with cls_only.

    Raises:
        ValueError: for shapes that do not fit, or a backend that is unknown or cannot run here (with the reason).
    """
    layout = read_layout(qkv_BS3ND, num_frames, axis)
    if qkv_BS3ND.is_cuda and (deterministic or torch.are_deterministic_algorithms_enabled()):
        backend = _deterministic_backend(backend)
    if cls_only and backend == "auto":
        chosen = load_backend("sdpa", qkv_BS3ND.device, qkv_BS3ND.dtype)
    else:
        name = resolve_backend(backend, qkv_BS3ND, num_frames, axis)
        chosen = load_backend(name, qkv_BS3ND.device, qkv_BS3ND.dtype)
    return chosen.cls_only(qkv_BS3ND, layout) if cls_only else chosen.full(qkv_BS3ND, layout, axis)


def _deterministic_backend(backend: str) -> str:
    """Return the backend to use with `deterministic` on CUDA."""
    if backend in ("sdpa", "xformers"):
        raise ValueError(
            f"backend: got {backend!r} with deterministic on CUDA, where its backward pass uses atomic additions; "
            "allowed: auto, reference, triton"
        )
    return "triton" if backend == "auto" else backend
