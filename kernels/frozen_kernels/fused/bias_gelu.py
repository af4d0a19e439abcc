"""Bias and GELU in one pass. The backward pass computes the gradients of input and bias together.

The plain form is `bias_gelu_reference`; the others are triton_bias_gelu and cpu_c_bias_gelu. Fusing saves passes over
the widest activations of a block. Axis letters: R rows (all axes but the last), D width.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from frozen_kernels.fused.forms import APPROXIMATE, fused_form
from frozen_kernels.operators import define_operator


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """One of the forms of GELU; see bias_gelu."""
    return x * torch.sigmoid(1.702 * x) if approximate == "sigmoid" else gelu(x, approximate=approximate)


def bias_gelu_reference(x: Tensor, bias_D: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x + bias) in x's dtype; the sum and the GELU in fp32."""
    return gelu_reference(x.float() + bias_D.float(), approximate).to(x.dtype)


@cache
def _kernels(form: str) -> ModuleType:
    """Return the module of a form."""
    return import_module(f"frozen_kernels.fused.{form}_bias_gelu")


def _launch_forward(x: Tensor, bias: Tensor, approximate: str, form: str) -> Tensor:
    return _kernels(form).launch_forward(x, bias, approximate)


def _fake_forward(x: Tensor, bias: Tensor, approximate: str, form: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch_backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str, form: str) -> tuple[Tensor, Tensor]:
    return _kernels(form).launch_backward(grad_out, x, bias, approximate)


def _fake_backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str, form: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


_forward = define_operator("bias_gelu", _launch_forward, _fake_forward)
_backward = define_operator("bias_gelu_backward", _launch_backward, _fake_backward)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, approximate: str, form: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.form = approximate, form
        return _forward(x, bias, approximate, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        return *_backward(grad_out, *ctx.saved_tensors, ctx.approximate, ctx.form), None, None


def bias_gelu(x: Tensor, bias_D: Tensor, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """gelu(x + bias).

    Args:
        x: [..., D], fp32, bf16 or fp16: the output of a linear layer without its bias.
        bias_D: the bias [D], in any of these dtypes.
        approximate: none (the exact GELU), tanh (as in torch), or sigmoid: v * sigmoid(1.702 v), the QuickGELU of
            OpenAI's CLIP.
        backend: auto (Triton on CUDA, C on a CPU), plain, triton, or cpu_c.

    Returns:
        [..., D] in x's dtype; differentiable in both.

    Raises:
        ValueError: for a bias of another width, an unknown form or a backend that cannot run here.
    """
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate: got {approximate!r}; allowed: {', '.join(APPROXIMATE)}")
    if bias_D.shape != x.shape[-1:]:
        raise ValueError(f"bias: got shape {tuple(bias_D.shape)}; allowed: [{x.shape[-1]}]")
    form = fused_form(backend, x.device, x.dtype)
    if form == "plain":
        return bias_gelu_reference(x, bias_D, approximate)
    out: Tensor = _BiasGelu.apply(x, bias_D, approximate, form)  # type: ignore[no-untyped-call]
    return out
