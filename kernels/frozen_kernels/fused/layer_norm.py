"""Residual sum and LayerNorm in one pass.

The plain form is `add_layer_norm_reference`; the others are frozen_kernels.fused.triton_layer_norm and
cpu_c_layer_norm. Axis letters: R rows (all axes but the last), D width.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from frozen_kernels.fused.forms import fused_form
from frozen_kernels.operators import define_operator


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    branch_bias_D: Tensor | None = None,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """(x + branch + branch_bias or x, LayerNorm of the sum in out_dtype), statistics in fp32."""
    total = x if branch is None else x + branch
    if branch_bias_D is not None:
        total = (total + branch_bias_D).to(total.dtype)
    normed = layer_norm(total.float(), (total.shape[-1],), weight_D.float(), bias_D.float(), eps)
    return total if keep_sum else x, normed.to(out_dtype)


@cache
def _kernels(form: str) -> ModuleType:
    """Return the module of a form."""
    return import_module(f"frozen_kernels.fused.{form}_layer_norm")


def sum_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """Return the wider of the two dtypes."""
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    keep_sum: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(form).launch_forward(x, branch, branch_bias, weight, bias, eps, out_dtype, keep_sum)


def _fake_forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    keep_sum: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if keep_sum else 0, dtype=sum_dtype(x, branch))
    return total, x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32)


def _launch_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
    through: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kernels(form).launch_backward(
        grad_stream, grad_normed, stream, branch, branch_bias, weight, statistics, branch_dtype, sum_branch, through
    )


def _fake_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    branch_dtype: torch.dtype | None,
    sum_branch: bool,
    through: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_branch = torch.empty_like(stream, dtype=branch_dtype) if branch_dtype else stream.new_empty(0)
    grad_branch_bias = weight.new_empty(stream.shape[-1] if sum_branch else 0, dtype=torch.float32)
    return torch.empty_like(stream), grad_branch, torch.empty_like(weight), torch.empty_like(weight), grad_branch_bias


_forward = define_operator("add_layer_norm", _launch_forward, _fake_forward)
_backward = define_operator("add_layer_norm_backward", _launch_backward, _fake_backward)


class _AddLayerNorm(torch.autograd.Function):
    """The two custom operators; without keep_sum, x is returned and its gradient added in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        out_dtype: torch.dtype,
        keep_sum: bool,
        form: str,
    ) -> tuple[Tensor, Tensor]:
        total, normed, statistics = _forward(x, branch, branch_bias, weight, bias, eps, out_dtype, keep_sum, form)
        ctx.set_materialize_grads(False)  # the last block's sum is unused
        ctx.keep_sum, ctx.form = keep_sum, form
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (x, branch, branch_bias, bias))
        if keep_sum:
            ctx.save_for_backward(total, None, None, weight, statistics)
            return total, normed
        ctx.save_for_backward(x, branch, branch_bias, weight, statistics)
        return x.view_as(x), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_stream, grad_normed = grads
        stream, branch, branch_bias, weight, statistics = ctx.saved_tensors
        x_dtype, branch_dtype, branch_bias_dtype, bias_dtype = ctx.dtypes
        if grad_normed is None:
            grad_normed = torch.zeros_like(stream)
        # With keep_sum, x and branch have the same gradient: one tensor serves both if their dtypes agree.
        apart = branch_dtype is not None and (not ctx.keep_sum or branch_dtype != stream.dtype)
        grad, grad_branch, grad_weight, grad_bias, grad_branch_bias = _backward(
            grad_stream,
            grad_normed,
            stream,
            branch,
            branch_bias,
            weight,
            statistics,
            branch_dtype if apart else None,
            branch_bias_dtype is not None,
            not ctx.keep_sum,
            ctx.form,
        )
        return (
            grad.to(x_dtype),
            (grad_branch if apart else grad) if branch_dtype is not None else None,
            grad_branch_bias.to(branch_bias_dtype) if branch_bias_dtype is not None else None,
            grad_weight,
            grad_bias.to(bias_dtype),
            *(None,) * 4,
        )


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    branch_bias_D: Tensor | None = None,
    keep_sum: bool = True,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and apply LayerNorm to the sum.

    Args:
        x: [..., D], fp32, bf16 or fp16: the residual stream.
        branch: [..., D], added to x, in any of these dtypes; None: nothing is added.
        weight_D: LayerNorm weight.
        bias_D: LayerNorm bias.
        branch_bias_D: added to the branch: the bias of the linear layer that computed the branch. Its gradient is
            computed together with the branch's, without another pass.
        keep_sum: return the sum. Otherwise return x and do not write the sum to memory; the gradient of the returned x
            is then added in the same backward pass.
        eps: added to the variance; 1e-6 in the released model.
        out_dtype: dtype of the normalised result; None: that of the sum.
        backend: auto (Triton on CUDA, C on a CPU), plain, triton, or cpu_c.

    Returns:
        (x + branch + branch_bias [..., D] in the wider dtype of x and branch, or x; the LayerNorm of the sum [..., D]);
        differentiable in all tensors.

    Raises:
        ValueError: for shapes that differ or a backend that cannot run here.
    """
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch: got shape {tuple(branch.shape)}; allowed: that of x, {tuple(x.shape)}")
    if weight_D.shape != x.shape[-1:] or bias_D.shape != x.shape[-1:]:
        raise ValueError(f"weight, bias: got {tuple(weight_D.shape)}, {tuple(bias_D.shape)}; allowed: [{x.shape[-1]}]")
    if branch_bias_D is not None and (branch is None or branch_bias_D.shape != x.shape[-1:]):
        got = f"{tuple(branch_bias_D.shape)} with{'out' if branch is None else ''} a branch"
        raise ValueError(f"branch_bias: got {got}; allowed: [{x.shape[-1]}] with a branch")
    out_dtype = out_dtype or sum_dtype(x, branch)
    form = fused_form(backend, x.device, sum_dtype(x, branch))
    if form == "plain":
        return add_layer_norm_reference(
            x, branch, weight_D, bias_D, eps, out_dtype, branch_bias_D=branch_bias_D, keep_sum=keep_sum
        )
    keep_sum = keep_sum and branch is not None  # without a branch, the sum is x
    arguments = (x, branch, branch_bias_D, weight_D, bias_D, eps, out_dtype, keep_sum, form)
    stream, normed = _AddLayerNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return stream, normed
