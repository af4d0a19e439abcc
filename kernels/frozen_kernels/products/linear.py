"""A linear layer that stays fast in bf16 on a CPU whose matrix library only takes fp32 (products.choice).

There the activations are bf16, as autocast makes them, in memory and for the backward pass; a step's three products
are computed in fp32, from the weight as it is, and rounded once. Everywhere else it is torch.nn.functional.linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_kernels.products import choice


class _WideLinear(torch.autograd.Function):
    """x narrow, weight and bias of any dtype; products in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            wide = grad.reshape(-1, grad.shape[-1]).float()
            if needs_x:
                grad_x = (wide @ weight.float()).to(x.dtype).view_as(x)
            if needs_weight:
                grad_weight = (wide.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
            if needs_bias:
                grad_bias = wide.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """X @ weight^T + bias, under autocast in its dtype.

    Args:
        x: [..., D].
        weight_OD: [O, D].
        bias_O: [O], or None.

    Returns:
        [..., O]; differentiable in all three.
    """
    if x.device.type == "cpu":
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if choice.multiplied_in(dtype) != dtype:
            return _WideLinear.apply(x.to(dtype), weight_OD, bias_O)
    return F.linear(x, weight_OD, bias_O)
