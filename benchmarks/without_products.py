"""Make matrix products cost nothing, to time what stands between them.

Without bf16 units PyTorch computes bf16 products in slow loops, and our layers compute them in fp32, so a step's time
on such a processor says nothing about one that has them. What stands between the products (casts, norms, GELU, softmax,
regrouping) is memory traffic and elementwise work on both, and that is what fused kernels are for. Values are garbage;
shapes, dtypes and every other operator are as in the real step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frozen_kernels.products import choice

_library: torch.library.Library | None = None


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _addmm(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def _baddbmm(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return _bmm(left, right)


def _bmm_out(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return out


def _baddbmm_out(
    bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1, *, out: Tensor
) -> Tensor:
    return out


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *unused: object) -> Tensor:
    """The patch projection of the released code, whose stride is its kernel."""
    grid = (size // step for size, step in zip(x.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], weight.shape[0], *grid)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *unused: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def drop_products() -> None:
    """Replace the CPU's matrix products in this process, for good.

    To be called before anything is computed: the threads of later operators then treat denormals as zero too. Garbage
    is full of them, real activations are not, and each would cost a hundred cycles.
    """
    global _library
    assert _library is None, "products are dropped already"
    torch.set_flush_denormal(True)
    choice.multiplied_in = lambda dtype: dtype  # as a processor with units for every dtype
    _library = torch.library.Library("aten", "IMPL")
    for name, function in {
        "mm": _mm, "addmm": _addmm, "bmm": _bmm, "baddbmm": _baddbmm, "bmm.out": _bmm_out,
        "baddbmm.out": _baddbmm_out, "convolution": _convolution, "convolution_backward": _convolution_backward,
    }.items():  # fmt: skip
        _library.impl(name, function, "CPU")
