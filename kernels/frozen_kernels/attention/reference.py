"""Divided attention in plain PyTorch, the reference for the other backends.

It follows the released code of Frozen in Time: heads are folded into the batch, tokens are regrouped by copies, the CLS
key and value are repeated for every group, and scores and probabilities are materialised. It is therefore also the
baseline of the benchmarks. Axis letters: see frozen_kernels.attention.qkv_layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frozen_kernels.attention.qkv_layout import Layout


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key^T) value, probabilities materialised; [G, queries, D] x [G, keys, D]."""
    scores = torch.einsum("gqd,gkd->gqk", query * scale, key)
    return torch.einsum("gqk,gkd->gqd", scores.softmax(dim=-1), value)


def cls_reference(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """The CLS query over all S tokens -> [B, 1, E]."""
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in qkv_BS3ND.unbind(2))
    out = softmax_attention(query[:, :1], key, value, layout.scale)
    return out.view(layout.batch, layout.heads, 1, layout.head_width).transpose(1, 2).flatten(2)


def _to_groups(tokens_GSD: Tensor, layout: Layout, axis: str) -> Tensor:
    """Patches of [B*N, S, D] regrouped: time -> [B*N*P, T, D], space -> [B*N*T, P, D]."""
    grid = tokens_GSD[:, 1:].unflatten(1, (layout.frames, layout.patches))
    return (grid.transpose(1, 2) if axis == "time" else grid).flatten(0, 1).contiguous()


def _from_groups(groups: Tensor, layout: Layout, axis: str) -> Tensor:
    """The inverse of _to_groups -> [B*N, T*P, D]."""
    if axis == "space":
        return groups.reshape(-1, layout.frames * layout.patches, layout.head_width)
    grid = groups.unflatten(0, (-1, layout.patches))
    return grid.transpose(1, 2).reshape(-1, layout.frames * layout.patches, layout.head_width)


def attention_reference(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens -> [B, S, E]; fp32, bf16 or fp16; differentiable through autograd."""
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in qkv_BS3ND.unbind(2))
    cls_out = softmax_attention(query[:, :1], key, value, layout.scale)

    query_groups = _to_groups(query, layout, axis)
    groups_per_head = query_groups.shape[0] // query.shape[0]

    def with_cls(tokens_GSD: Tensor) -> Tensor:
        cls_rows = tokens_GSD[:, :1].repeat_interleave(groups_per_head, dim=0)
        return torch.cat([cls_rows, _to_groups(tokens_GSD, layout, axis)], dim=1)

    patch_out = softmax_attention(query_groups, with_cls(key), with_cls(value), layout.scale)
    out = torch.cat([cls_out, _from_groups(patch_out, layout, axis)], dim=1)
    return out.unflatten(0, (layout.batch, layout.heads)).transpose(1, 2).flatten(2)
