"""What attention backends are compared with, and how far off they may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frozen_kernels.attention.qkv_layout import read_layout
from frozen_kernels.attention.reference import attention_reference

Compute = Callable[[Tensor], Tensor]


def attention_by_mask(qkv_BS3ND: Tensor, num_frames: int, axis: str) -> Tensor:
    """Divided attention written as one masked softmax over all S x S pairs, in float64."""
    tokens, width = qkv_BS3ND.shape[1], qkv_BS3ND.shape[4]
    patches = (tokens - 1) // num_frames
    index = torch.arange(tokens - 1)
    group = index % patches if axis == "time" else index // patches
    visible = torch.ones(tokens, tokens, dtype=torch.bool)
    visible[1:, 1:] = group[:, None] == group[None, :]
    query, key, value = qkv_BS3ND.double().unbind(2)
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) * width**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, value).flatten(2)


def make_case(batch: int, frames: int, patches: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random qkv [B, S, 3, N, D] and output gradient [B, S, N*D], fp32."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + frames * patches
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    return qkv, torch.randn(batch, tokens, heads * width, generator=generator)


def run(compute: Compute, qkv: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of q, k and v, as float64 on the CPU."""
    leaf = qkv.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = compute(leaf)
    assert out.dtype == qkv.dtype, f"asked in {qkv.dtype}, answered in {out.dtype}"
    out.backward(grad.to(out.dtype)[:, : out.shape[1]])
    query, key, value = leaf.grad.double().cpu().unbind(2)
    return {"out": out.detach().double().cpu(), "query": query, "key": key, "value": value}


def exact(qkv: Tensor, grad: Tensor, num_frames: int, axis: str) -> dict[str, Tensor]:
    """The truth in float64, by the mask."""
    return run(lambda x: attention_by_mask(x, num_frames, axis), qkv.double().cpu(), grad.double().cpu())


def errors(compute: Compute, qkv: Tensor, grad: Tensor, num_frames: int, axis: str) -> dict[str, dict[str, float]]:
    """Per output: largest error against the truth, root mean square error, and PyTorch's own in that dtype.

    The truth is computed from the values as they are in qkv's dtype, so that only the computation counts.
    PyTorch's own error is that of the plain form in the same dtype.
    """
    truth = exact(qkv, grad.to(qkv.dtype), num_frames, axis)
    ours = run(compute, qkv, grad)
    layout = read_layout(qkv, num_frames, axis)
    plain = run(lambda x: attention_reference(x, layout, axis), qkv, grad)
    return {
        name: {
            "largest": (ours[name] - truth[name]).abs().max().item(),
            "rms": (ours[name] - truth[name]).square().mean().sqrt().item(),
            "plain_rms": (plain[name] - truth[name]).square().mean().sqrt().item(),
        }
        for name in truth
    }


def assert_close(found: dict[str, dict[str, float]], dtype: torch.dtype, *, cut_off: bool = False) -> None:
    """Hold fp32 to 1e-5, and bf16 and fp16 to twice PyTorch's own error.

    cut_off: the numbers come from Triton's interpreter, which cuts fp32 off to bf16 instead of rounding; that error
    is twice a rounding's (rms), so bf16 is held to twice as much there. Compiled kernels round (tests/gpu).
    """
    for name, error in found.items():
        if dtype == torch.float32:
            assert error["largest"] <= 1e-5, f"{name}: {error}"
        else:
            times = 4 if cut_off and dtype == torch.bfloat16 else 2
            assert error["rms"] <= times * error["plain_rms"] + 1e-7, f"{name}: {error}"
