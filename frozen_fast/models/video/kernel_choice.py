"""Which kernels a tower runs: settled before a stage where "auto" cannot choose then, and told to the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frozen_kernels import chosen_backends, fused_form, resolve_backend
from frozen_kernels.attention.api import load_backend

AUTO_ATTENTION = "auto"


def settle_attention(backend: str, shape: tuple[int, ...], frames: int, axis: str, like: Tensor) -> str:
    """The backend that a name stands for at a shape, imported: an import inside a compiled step would break its graph.

    Args:
        backend: "auto" or a backend of frozen_kernels.
        shape: of qkv_BS3ND, with the stage's own batch: that is what is measured on CUDA.
        frames: T.
        axis: "time" or "space".
        like: a tensor of the device and dtype.
    """
    # Only sizes, dtype and device are read, so one number stands for all.
    name = resolve_backend(backend, like.new_empty(()).expand(shape), frames, axis, whole_batch=True)
    load_backend(name, like.device, like.dtype)
    return name


def kernels_of(attention: str, fused_ops: str, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """Attention backends as chosen so far, and the form of the fused ops, for environment.json."""
    backends = [{"backend": attention, "how": "model.video.attention"}]
    if attention == AUTO_ATTENTION:
        backends = chosen_backends()
    form = "compiled" if compiled else fused_form(fused_ops, device, torch.float32)
    return {"attention_backends": backends, "fused_ops": form}
