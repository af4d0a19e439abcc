"""Matrix products as the CPU forms use them: in fp32 where the processor's matrix library does not take the dtype.

PyTorch then multiplies narrow matrices in loops of its own, 8 to 240 times slower than fp32 ones (docs/LOG.md).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a CPU should multiply matrices of this dtype in: itself, or fp32."""
    return _ask(dtype)


@lru_cache(maxsize=8)
def _ask(dtype: torch.dtype) -> torch.dtype:
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in asks:
        return dtype
    taken = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asks[dtype])()
    return dtype if taken else torch.float32


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Left @ right for [G, M, K] and [G, K, N] on a CPU, into out if given."""
    dtype = multiplied_in(left.dtype)
    if dtype == left.dtype:
        return torch.bmm(left, right, out=out)
    return _narrowed(torch.bmm(left.to(dtype), right.to(dtype)), left.dtype, out)


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Scale * left @ right likewise, the factor applied before rounding."""
    dtype = multiplied_in(left.dtype)
    empty = left.new_empty((), dtype=dtype).expand(left.shape[0], left.shape[1], right.shape[2])
    if dtype == left.dtype:
        return torch.baddbmm(empty, left, right, beta=0, alpha=scale, out=out)
    return _narrowed(torch.baddbmm(empty, left.to(dtype), right.to(dtype), beta=0, alpha=scale), left.dtype, out)


def _narrowed(wide: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return wide.to(dtype) if out is None else out.copy_(wide)
