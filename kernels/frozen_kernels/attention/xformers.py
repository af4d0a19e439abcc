"""Divided attention through xformers.ops.memory_efficient_attention, BMHK layout.

The space axis of one frame and the CLS row read strided views of the packed qkv. Otherwise queries, keys and values are
copied once. On the time axis a group has only T queries, but these kernels work on tiles of 64 rows or more. Several
positions are therefore packed into one sequence that shares one CLS key. An additive bias separates them: 0 within a
position and on CLS, -inf elsewhere. Batches beyond the limit of 65,535 of a grid axis are split. This module chooses
the operators by name and records them in OPERATORS_USED.

Axis letters: see frozen_kernels.attention.qkv_layout; G positions of a pack, M queries and K keys of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from frozen_kernels.attention.qkv_layout import Layout, patch_view

GRID_LIMIT = 65_535
PACK_ROWS = 63
WIDTH_MULTIPLE = 8

OPERATORS_USED: dict[str, str] = {}
"""Operators that ran: "cls", "space" or "time" -> names of the forward and the backward operator."""


def pack_size(patches: int, frames: int, rows: int = PACK_ROWS) -> int:
    """Positions per pack: the largest divisor of P whose queries fill at most `rows` rows (at least 1)."""
    return max(size for size in range(1, patches + 1) if patches % size == 0 and (size == 1 or size * frames <= rows))


def batch_slices(batch: int, limit: int = GRID_LIMIT) -> Iterator[slice]:
    """Slices of a batch axis of at most `limit` rows."""
    for start in range(0, batch, limit):
        yield slice(start, min(start + limit, batch))


@lru_cache(maxsize=64)
def pack_bias(frames: int, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, M, K]: 0 for keys that a query of a pack attends to, -inf elsewhere; M = T*G, K = 1 + T*G, frame by frame.

    The rows are slices of wider rows, because the kernel requires each row to start at a multiple of 8 elements.
    """
    position = torch.arange(frames * positions, device=device) % positions
    keys = 1 + frames * positions
    wide = torch.zeros(frames * positions, -(-keys // 8) * 8, dtype=dtype, device=device)
    wide[:, 1:keys].masked_fill_(position[:, None] != position[None, :], float("-inf"))
    return wide[None, None, :, :keys]


def _operator_pairs() -> list[tuple[Any, Any]]:
    """(forward, backward) operator classes, fastest first."""
    from xformers.ops import fmha

    pairs = [(fmha.flash.FwOp, fmha.flash.BwOp), (fmha.cutlass.FwOp, fmha.cutlass.BwOp)]
    if getattr(fmha.flash3, "_C_flashattention3", None) is not None:
        pairs.insert(0, (fmha.flash3.FwOp, fmha.flash3.BwOp))
    return pairs


_pairs_found: dict[tuple[Any, ...], tuple[Any, Any]] = {}
"""Results of choose_operators by shape and layout, because its checks take longer than a small launch."""


def choose_operators(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Any, Any]:
    """Return the first pair of operators that supports the inputs forward and backward.

    Raises:
        ValueError: if none does, with each operator's reasons.
    """
    from xformers.ops.fmha import Inputs

    known = (query.shape, key.shape, query.stride(), key.stride(), query.dtype, query.device, bias is None)
    if known in _pairs_found:
        return _pairs_found[known]
    inputs = Inputs(query=query, key=key, value=value, attn_bias=bias)
    reasons = []
    for pair in _operator_pairs():
        found = [reason for operator in pair for reason in operator.not_supported_reasons(inputs)]
        if not found:
            _pairs_found[known] = pair
            return pair
        reasons.append(f"{pair[0].NAME}: {'; '.join(found)}")
    raise ValueError(f"backend: got 'xformers'; no operator supports these inputs ({' | '.join(reasons)})")


def _attend(use: str, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """memory_efficient_attention of [B, M, N, D] x [B, K, N, D], split where the batch passes the grid limit."""
    from xformers.ops import memory_efficient_attention

    results = []
    for rows in batch_slices(query.shape[0]):
        parts = query[rows], key[rows], value[rows]
        count, heads = parts[0].shape[0], parts[0].shape[2]
        full_bias = None if bias is None else bias.expand(count, heads, -1, -1)
        operators = choose_operators(*parts, full_bias)
        OPERATORS_USED[use] = " + ".join(operator.NAME for operator in operators)
        results.append(memory_efficient_attention(*parts, attn_bias=full_bias, scale=scale, op=operators))
    return results[0] if len(results) == 1 else torch.cat(results)


def _padded(qkv_BS3ND: Tensor) -> Tensor:
    """Pad the head width with zeros to a multiple of 8, which the kernels require (the result does not change)."""
    return pad(qkv_BS3ND, (0, -qkv_BS3ND.shape[-1] % WIDTH_MULTIPLE))


def _cls_row(qkv: Tensor, layout: Layout) -> Tensor:
    query, key, value = qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2]
    return _attend("cls", query, key, value, layout.scale)[..., : layout.head_width]


def _time_groups(qkv: Tensor, layout: Layout) -> Tensor:
    """Packs of G positions -> [B, T, P, N, D]."""
    size = pack_size(layout.patches, layout.frames)
    packs = layout.patches // size

    def packed(tokens: Tensor) -> Tensor:
        grid = patch_view(tokens, layout).unflatten(2, (packs, size))
        return grid.transpose(1, 2).flatten(2, 3)

    def packed_keys(tokens: Tensor) -> Tensor:
        cls_token = tokens[:, :1, None].expand(-1, packs, 1, -1, -1)
        return torch.cat([cls_token, packed(tokens)], dim=2).flatten(0, 1)

    query = packed(qkv[:, :, 0]).flatten(0, 1)
    key, value = packed_keys(qkv[:, :, 1]), packed_keys(qkv[:, :, 2])
    bias = pack_bias(layout.frames, size, qkv.dtype, qkv.device)
    out = _attend("time", query, key, value, layout.scale, bias)
    grid = out.unflatten(0, (layout.batch, packs)).unflatten(2, (layout.frames, size))
    return grid.transpose(1, 2).flatten(2, 3)


def _space_groups(qkv: Tensor, layout: Layout) -> Tensor:
    """Frames folded into the batch -> [B, T, P, N, D]."""

    def frame_keys(tokens: Tensor) -> Tensor:
        cls_token = tokens[:, :1, None].expand(-1, layout.frames, 1, -1, -1)
        return torch.cat([cls_token, patch_view(tokens, layout)], dim=2).flatten(0, 1)

    query = patch_view(qkv[:, :, 0], layout).flatten(0, 1)
    out = _attend("space", query, frame_keys(qkv[:, :, 1]), frame_keys(qkv[:, :, 2]), layout.scale)
    return out.unflatten(0, (layout.batch, layout.frames))


def cls_xformers(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """The CLS query over all S tokens -> [B, 1, E], on strided views."""
    return _cls_row(_padded(qkv_BS3ND), layout).flatten(2)


def attention_xformers(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens on CUDA -> [B, S, E]; fp32, bf16 or fp16; differentiable."""
    qkv = _padded(qkv_BS3ND)
    if axis == "space" and layout.frames == 1:
        out = _attend("space", qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], layout.scale)
        return out[..., : layout.head_width].flatten(2)
    groups = _time_groups(qkv, layout) if axis == "time" else _space_groups(qkv, layout)
    patches = groups[..., : layout.head_width].reshape(layout.batch, layout.tokens - 1, layout.width)
    return torch.cat([_cls_row(qkv, layout).flatten(2), patches], dim=1)
