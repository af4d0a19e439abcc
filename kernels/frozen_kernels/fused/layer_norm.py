"""Residual sum and LayerNorm in one pass: the sum is written once and normalised while it is in registers.

The plain form is `add_layer_norm_reference`; the others are frozen_kernels.fused.triton_layer_norm and
cpu_c_layer_norm. Legend: R rows (all axes but the last), D width.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from frozen_kernels.fused.forms import fused_form


def add_layer_norm_reference(
    x: Tensor, branch: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + branch, LayerNorm of it in out_dtype), statistics in fp32."""
    total = x if branch is None else x + branch
    normed = layer_norm(total.float(), (total.shape[-1],), weight_D.float(), bias_D.float(), eps)
    return total, normed.to(out_dtype)


def _kernels(form: str) -> ModuleType:
    """The module of a form."""
    return import_module(f"frozen_kernels.fused.{form}_layer_norm")


@torch.library.custom_op("frozen_kernels::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(form).launch_forward(x, branch, weight, bias, eps, out_dtype)


@_forward.register_fake
def _(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    rows = x.numel() // x.shape[-1]
    total, normed = (x.new_empty(x.shape, dtype=kind) for kind in (dtype, out_dtype))
    return total, normed, x.new_empty(rows, 2, dtype=torch.float32)


@torch.library.custom_op("frozen_kernels::add_layer_norm_backward", mutates_args=())
def _backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    narrow_dtype: torch.dtype | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(form).launch_backward(grad_total, grad_normed, total, weight, statistics, narrow_dtype)


@_backward.register_fake
def _(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    narrow_dtype: torch.dtype | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = torch.empty_like(total, dtype=narrow_dtype) if narrow_dtype else total.new_empty(0)
    return torch.empty_like(total), narrow, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight, bias, _, _, ctx.form = inputs
    ctx.dtypes = (x.dtype, None if branch is None else branch.dtype, bias.dtype)
    ctx.set_materialize_grads(False)  # the last block's sum goes nowhere
    ctx.save_for_backward(output[0], weight, output[2])


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, unused: None
) -> tuple[Tensor | None, ...]:
    total, weight, statistics = ctx.saved_tensors
    x_dtype, branch_dtype, bias_dtype = ctx.dtypes
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    narrow_dtype = next((kind for kind in (branch_dtype, x_dtype) if kind not in (None, total.dtype)), None)
    grad, narrow, grad_weight, grad_bias = _backward(
        grad_total, grad_normed, total, weight, statistics, narrow_dtype, ctx.form
    )
    by_dtype = {total.dtype: grad, narrow_dtype: narrow}

    def gradient(dtype: torch.dtype) -> Tensor:
        # bf16 and fp16 add up to fp32: then two dtypes are narrower than the sum's
        return by_dtype[dtype] if dtype in by_dtype else grad.to(dtype)

    grad_branch = None if branch_dtype is None else gradient(branch_dtype)
    return gradient(x_dtype), grad_branch, grad_weight, grad_bias.to(bias_dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum, and its LayerNorm.

    Args:
        x: [..., D], fp32, bf16 or fp16: the residual stream.
        branch: [..., D], what is added to it, in any of these dtypes; None: nothing.
        weight_D: LayerNorm weight.
        bias_D: LayerNorm bias.
        eps: added to the variance; 1e-6 in the released model.
        out_dtype: dtype of the normalised result; none: that of the sum.
        backend: auto (Triton on CUDA, C on a CPU), plain, triton, or cpu_c.

    Returns:
        (x + branch [..., D] in the wider of both dtypes, its LayerNorm [..., D]); differentiable in all tensors.

    Raises:
        ValueError: for shapes that differ or a backend that cannot run here.
    """
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch: got shape {tuple(branch.shape)}; allowed: that of x, {tuple(x.shape)}")
    if weight_D.shape != x.shape[-1:] or bias_D.shape != x.shape[-1:]:
        raise ValueError(f"weight, bias: got {tuple(weight_D.shape)}, {tuple(bias_D.shape)}; allowed: [{x.shape[-1]}]")
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    out_dtype = out_dtype or dtype
    form = fused_form(backend, x.device, dtype)
    if form == "plain":
        return add_layer_norm_reference(x, branch, weight_D, bias_D, eps, out_dtype)
    total, normed, _ = _forward(x, branch, weight_D, bias_D, eps, out_dtype, form)
    return total, normed
