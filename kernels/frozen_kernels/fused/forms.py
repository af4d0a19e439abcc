"""The choice between the forms of the fused ops: plain PyTorch, Triton on GPUs (or its interpreter), C on CPUs."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from frozen_kernels.availability import why_not

FusedForm = Literal["plain", "triton", "cpu_c"]
FORMS: tuple[FusedForm, ...] = get_args(FusedForm)

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
    if backend == "auto":
        fastest: FusedForm = "triton" if device.type == "cuda" else "cpu_c"
        return "plain" if why_not(fastest, device, dtype) else fastest
    if backend not in FORMS:
        raise ValueError(f"backend: got {backend!r}; allowed: auto, {', '.join(FORMS)}")
    reason = "" if backend == "plain" else why_not(backend, device, dtype)
    if reason:
        usable = [form for form in FORMS if form == "plain" or not why_not(form, device, dtype)]
        raise ValueError(
            f"backend: got {backend!r}, which cannot run here: {reason}; allowed: auto, {', '.join(usable)}"
        )
    return backend
