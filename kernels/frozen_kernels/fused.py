"""Which form of a fused op runs: plain PyTorch, Triton on GPUs (or its interpreter), C on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from frozen_kernels.availability import unavailable_backends

FusedForm = Literal["plain", "triton", "native"]


def fused_form(backend: str, device: torch.device, dtype: torch.dtype, forms: Sequence[FusedForm]) -> FusedForm:
    """The form that runs; `auto`: Triton on CUDA, C on a CPU, each where the op has it and it can run, or plain.

    Args:
        backend: "auto" or one of forms.
        device: where the tensors are.
        dtype: of the op's input.
        forms: those that the op has.

    Raises:
        ValueError: for an unknown name, or for a form that cannot run here (with the reason).
    """
    if backend not in ("auto", *forms):
        raise ValueError(f"backend: got {backend!r}; allowed: auto, {', '.join(forms)}")
    missing = unavailable_backends(device, dtype)
    if backend == "auto":
        fastest: FusedForm = "triton" if device.type == "cuda" else "native"
        return fastest if fastest in forms and fastest not in missing else "plain"
    if backend in missing:
        usable = [form for form in forms if form not in missing]
        raise ValueError(
            f"backend: got {backend!r}, which cannot run here: {missing[backend]}; allowed: auto, {', '.join(usable)}"
        )
    return next(form for form in forms if form == backend)
