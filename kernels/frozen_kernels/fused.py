"""Which form of a fused op runs: plain PyTorch, or Triton where a GPU (or Triton's interpreter) can run it."""

from __future__ import annotations

import torch

from frozen_kernels.availability import unavailable_backends

FUSED_BACKENDS = ("auto", "plain", "triton")


def use_triton(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused op runs in Triton; `auto`: on CUDA where Triton can, plain elsewhere.

    Raises:
        ValueError: for an unknown name, or for triton where it cannot run (with the reason).
    """
    if backend not in FUSED_BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: {', '.join(FUSED_BACKENDS)}")
    if backend == "plain" or (backend == "auto" and device.type != "cuda"):
        return False
    reason = unavailable_backends(device, dtype).get("triton")
    if reason and backend == "triton":
        raise ValueError(f"backend: got 'triton', which cannot run here: {reason}; allowed: auto, plain")
    return not reason
