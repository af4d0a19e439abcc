"""Fused ops against their plain forms in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from frozen_kernels import add_layer_norm, bias_gelu
from frozen_kernels.fused.bias_gelu import bias_gelu_reference
from frozen_kernels.fused.layer_norm import add_layer_norm_reference

FUSED_CASES = [
    # op, dtype, rows, width
    ("add_layer_norm", "float32", 5, 24),
    ("add_layer_norm", "float32", 1, 1),
    ("add_layer_norm", "bfloat16", 9, 768),
    ("layer_norm", "float32", 7, 33),
    ("layer_norm", "float16", 3, 64),
    ("mixed_layer_norm", "bfloat16", 6, 48),
    ("biased_layer_norm", "float32", 5, 24),
    ("biased_layer_norm", "bfloat16", 70, 48),
    ("mixed_biased_layer_norm", "bfloat16", 6, 48),
    ("through_layer_norm", "float32", 5, 24),
    ("through_layer_norm", "bfloat16", 70, 48),
    ("mixed_through_layer_norm", "bfloat16", 6, 48),
    ("bias_gelu", "float32", 5, 24),
    ("bias_gelu", "float32", 1, 1),
    ("bias_gelu", "bfloat16", 11, 300),
    ("bias_gelu", "float16", 9, 64),
    ("bias_gelu_sigmoid", "float32", 5, 24),
    ("bias_gelu_sigmoid", "bfloat16", 11, 300),
    ("bias_gelu_tanh", "float32", 5, 24),
    ("bias_gelu_tanh", "bfloat16", 11, 300),
]


def fused_errors(op: str, dtype: str, rows: int, width: int, backend: str = "triton", device: str = "cpu"):
    """Errors per output and gradient, in the form of support.attention_cases.errors."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind).to(device)

    if op.startswith("bias_gelu"):
        inputs = [draw(2, rows, width), draw(width)]
        approximate = op.removeprefix("bias_gelu").removeprefix("_") or "none"
        ours = partial(bias_gelu, approximate=approximate, backend=backend)
        plain = partial(bias_gelu_reference, approximate=approximate)
        exact: Callable[..., object] = partial(_exact_gelu, approximate)
    else:
        branch = [] if op == "layer_norm" else [draw(2, rows, width)]
        first = draw(2, rows, width).to(torch.float32 if "mixed" in op else kind)
        inputs = [first, draw(width), draw(width), *branch]
        if "biased" in op or "through" in op:
            inputs.append(draw(width))
        keep_sum = "through" not in op
        ours = partial(_layer_norm, partial(add_layer_norm, backend=backend, out_dtype=kind), keep_sum)
        plain = partial(_layer_norm, partial(_plain_layer_norm, out_dtype=kind), keep_sum)
        exact = partial(_layer_norm, _exact_layer_norm, keep_sum)
    weights = torch.Generator().manual_seed(1)
    truth = _run(exact, [value.double() for value in inputs], weights)
    found, own = _run(ours, inputs, weights), _run(plain, inputs, weights)
    return {
        name: {
            "largest": (found[name] - truth[name]).abs().max().item(),
            "rms": (found[name] - truth[name]).square().mean().sqrt().item(),
            "plain_rms": (own[name] - truth[name]).square().mean().sqrt().item(),
        }
        for name in truth
    }


def _layer_norm(
    function, keep_sum: bool, x: Tensor, weight: Tensor, bias: Tensor, branch=None, branch_bias=None
) -> tuple[Tensor, Tensor]:
    return function(x, branch, weight, bias, branch_bias_D=branch_bias, keep_sum=keep_sum)


def _plain_layer_norm(x, branch, weight, bias, out_dtype, branch_bias_D, keep_sum):
    return add_layer_norm_reference(
        x, branch, weight, bias, 1e-6, out_dtype, branch_bias_D=branch_bias_D, keep_sum=keep_sum
    )


def _exact_layer_norm(x, branch, weight, bias, branch_bias_D, keep_sum):
    total = x if branch is None else x + branch
    total = total if branch_bias_D is None else total + branch_bias_D
    deviation = (total.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normed = (total - total.mean(dim=-1, keepdim=True)) / deviation * weight + bias
    return total if keep_sum else x, normed


def _exact_gelu(approximate: str, x: Tensor, bias: Tensor) -> Tensor:
    value = x + bias
    if approximate == "sigmoid":
        return value / (1 + torch.exp(-1.702 * value))
    if approximate == "tanh":
        return value * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (value + 0.044715 * value**3)))
    return value * 0.5 * (1 + torch.erf(value / 2**0.5))


def _run(function, inputs: list[Tensor], weights: torch.Generator) -> dict[str, Tensor]:
    """Outputs and input gradients in float64; the outputs' gradients are the same in every run."""
    weights.manual_seed(1)
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn(out.shape, generator=weights).to(out.device, torch.bfloat16).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, grads)
    named = {f"out{index}": out.detach() for index, out in enumerate(outputs)}
    named.update({f"grad{index}": leaf.grad for index, leaf in enumerate(leaves)})
    return {name: value.double().cpu() for name, value in named.items()}
