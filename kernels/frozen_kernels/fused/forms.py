"""The choice between the forms of the fused ops: plain PyTorch, Triton on GPUs (or its interpreter), C on CPUs."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from frozen_kernels.availability import unavailable_backends

FusedForm = Literal["plain", "triton", "cpu_c"]

APPROXIMATE = {"none": 0, "sigmoid": 1, "tanh": 2}
"""Forms of GELU by name -> their number in the kernels."""


def fused_form(backend: str, device: torch.device, dtype: torch.dtype) -> FusedForm:
    """Return the form that runs. `auto` is Triton on CUDA and C on a CPU, or plain if these cannot run.

    Args:
        backend: "auto" or a FusedForm.
        device: device of the tensors.
        dtype: dtype of the op's input.

    Raises:
        ValueError: for an unknown name, or for a form that cannot run here (with the reason).
    """
    forms: tuple[FusedForm, ...] = get_args(FusedForm)
    if backend not in ("auto", *forms):
        raise ValueError(f"backend: got {backend!r}; allowed: auto, {', '.join(forms)}")
    missing = unavailable_backends(device, dtype)
    if backend == "auto":
        fastest: FusedForm = "triton" if device.type == "cuda" else "cpu_c"
        return "plain" if fastest in missing else fastest
    if backend in missing:
        usable = [form for form in forms if form not in missing]
        raise ValueError(
            f"backend: got {backend!r}, which cannot run here: {missing[backend]}; allowed: auto, {', '.join(usable)}"
        )
    return next(form for form in forms if form == backend)
