"""Addition of CLS token and position embeddings to patch embeddings in one pass.

All devices use the same form. It writes the sums into the token sequence without concatenation and without a position
tensor of the batch's size. The backward pass reduces over the batch once and returns the patches' gradient as a view.
The plain form is `add_positions_reference`. Axis letters: see frozen_kernels.attention.qkv_layout; here D is the
model's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from frozen_kernels.operators import define_operator


def add_positions_reference(patches_BTPD: Tensor, cls_11D: Tensor, pos_1KD: Tensor, temporal_1TD: Tensor) -> Tensor:
    """[CLS + pos[0], patches + pos[1..] + temporal[t]] in separate steps; K = 1 + P."""
    batch, frames, patches, _ = patches_BTPD.shape
    tiled = pos_1KD[:, 1:].repeat(1, frames, 1)
    repeated = temporal_1TD[:, :frames].repeat_interleave(patches, dim=1)
    cls_token = (cls_11D + pos_1KD[:, :1]).expand(batch, -1, -1)
    return torch.cat([cls_token, patches_BTPD.flatten(1, 2) + (tiled + repeated)], dim=1)


def _compute(patches: Tensor, cls_token: Tensor, pos: Tensor, temporal: Tensor) -> Tensor:
    batch, frames, count, width = patches.shape
    out = pos.new_empty(batch, 1 + frames * count, width)
    positions = pos[:, None, 1:] + temporal[:, :frames, None]
    torch.add(patches, positions, out=out[:, 1:].unflatten(1, (frames, count)))
    out[:, :1] = cls_token + pos[:, :1]
    return out


def _fake(patches: Tensor, cls_token: Tensor, pos: Tensor, temporal: Tensor) -> Tensor:
    batch, frames, count, width = patches.shape
    return pos.new_empty(batch, 1 + frames * count, width)


_operator = define_operator("add_positions", _compute, _fake)


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, cls_token: Tensor, pos: Tensor, temporal: Tensor) -> Tensor:
        ctx.frames, ctx.count, ctx.learned = patches.shape[1], patches.shape[2], temporal.shape[1]
        ctx.dtype = patches.dtype
        return _operator(patches, cls_token, pos, temporal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        over_batch = grad.sum(dim=0, keepdim=True)
        grid = over_batch[:, 1:].unflatten(1, (ctx.frames, ctx.count))
        grad_pos = torch.cat([over_batch[:, :1], grid.sum(dim=1)], dim=1)
        grad_temporal = torch.nn.functional.pad(grid.sum(dim=2), (0, 0, 0, ctx.learned - ctx.frames))
        grad_patches = grad[:, 1:].unflatten(1, (ctx.frames, ctx.count)).to(ctx.dtype)
        return grad_patches, over_batch[:, :1].clone(), grad_pos, grad_temporal


def add_positions(patches_BTPD: Tensor, cls_11D: Tensor, pos_1KD: Tensor, temporal_1TD: Tensor) -> Tensor:
    """Build the token sequence of a clip: CLS, then the patches frame by frame, with their position embeddings.

    Args:
        patches_BTPD: embedded patches [B, T, P, D], fp32, bf16 or fp16.
        cls_11D: the CLS token [1, 1, D].
        pos_1KD: spatial position embeddings [1, 1 + P, D], entry 0 for CLS.
        temporal_1TD: temporal position embeddings [1, T_max, D], T_max >= T; not added to CLS.

    Returns:
        [B, 1 + T*P, D] in the dtype of pos; differentiable in all four.

    Raises:
        ValueError: for shapes that do not fit, or parameters of different dtypes.
    """
    batch, frames, count, width = patches_BTPD.shape
    if cls_11D.shape != (1, 1, width) or pos_1KD.shape != (1, 1 + count, width):
        got = f"cls {tuple(cls_11D.shape)}, pos {tuple(pos_1KD.shape)}"
        raise ValueError(f"positions: got {got}; allowed: (1, 1, {width}), (1, {1 + count}, {width})")
    if temporal_1TD.shape[0] != 1 or temporal_1TD.shape[1] < frames or temporal_1TD.shape[2] != width:
        raise ValueError(
            f"positions: got temporal {tuple(temporal_1TD.shape)}; allowed: (1, at least {frames}, {width})"
        )
    if not cls_11D.dtype == pos_1KD.dtype == temporal_1TD.dtype:
        raise ValueError("positions: got parameters of different dtypes; allowed: one dtype")
    if torch.compiler.is_exporting():  # an exported program must run without this library
        return add_positions_reference(patches_BTPD, cls_11D, pos_1KD, temporal_1TD)
    tokens: Tensor = _AddPositions.apply(patches_BTPD, cls_11D, pos_1KD, temporal_1TD)  # type: ignore[no-untyped-call]
    return tokens
