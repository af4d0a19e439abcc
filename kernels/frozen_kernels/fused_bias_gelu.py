"""Bias and exact GELU in one pass, the bias's gradient reduced in the pass that computes the input's.

The plain form is `bias_gelu_reference`; the Triton form is frozen_kernels.triton_bias_gelu. It saves a pass where
the matrix product before it cannot add the bias itself. Legend: R rows (all axes but the last), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from frozen_kernels.fused import use_triton


def bias_gelu_reference(x: Tensor, bias_D: Tensor) -> Tensor:
    """gelu(x + bias) in x's dtype; the sum and the GELU in fp32."""
    return gelu(x.float() + bias_D.float()).to(x.dtype)


@torch.library.custom_op("frozen_kernels::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    from frozen_kernels.triton_bias_gelu import launch_forward

    return launch_forward(x, bias)


@_forward.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("frozen_kernels::bias_gelu_backward", mutates_args=())
def _backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from frozen_kernels.triton_bias_gelu import launch_backward

    return launch_backward(grad_out, x, bias)


@_backward.register_fake
def _(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad_out, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def bias_gelu(x: Tensor, bias_D: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(x + bias), the exact GELU of the released model.

    Args:
        x: [..., D], fp32, bf16 or fp16: a matrix product without its bias.
        bias_D: the bias, in any of these dtypes.
        backend: auto (Triton on CUDA), plain, or triton.

    Returns:
        [..., D] in x's dtype; differentiable in both.

    Raises:
        ValueError: for a bias of another width or a backend that cannot run here.
    """
    if bias_D.shape != x.shape[-1:]:
        raise ValueError(f"bias: got shape {tuple(bias_D.shape)}; allowed: [{x.shape[-1]}]")
    return _forward(x, bias_D) if use_triton(backend, x.device, x.dtype) else bias_gelu_reference(x, bias_D)
