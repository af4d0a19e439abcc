"""Divided attention through torch's scaled_dot_product_attention.

The CLS row and the space axis of one frame read views of the packed tensor. Otherwise queries, keys and values are
copied once, because each group needs the CLS key in front and a kernel for four axes cannot read the packed strides.
Groups are folded into the heads, not into the batch, so that B*P*N does not reach the limit of 65,535 of a grid axis.
Axis letters: see frozen_kernels.attention.qkv_layout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from frozen_kernels.attention.qkv_layout import Layout, patch_view


def cls_sdpa(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """The CLS query over all S tokens -> [B, 1, E], on strided views."""
    query, key, value = (part.transpose(1, 2) for part in qkv_BS3ND.unbind(2))
    return scaled_dot_product_attention(query[:, :, :1], key, value).transpose(1, 2).flatten(2)


def _time_groups(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """A position's tokens over time -> [B, T, P, N, D]; groups (position, head) become SDPA's heads."""
    query = patch_view(qkv_BS3ND[:, :, 0], layout)
    key, value = (_keys_with_cls(qkv_BS3ND[:, :, index], layout, frames_first=True) for index in (1, 2))
    out = scaled_dot_product_attention(
        query.flatten(2, 3).transpose(1, 2), key.flatten(2, 3).transpose(1, 2), value.flatten(2, 3).transpose(1, 2)
    )
    return out.transpose(1, 2).unflatten(2, (layout.patches, layout.heads))


def _keys_with_cls(tokens_BSND: Tensor, layout: Layout, *, frames_first: bool) -> Tensor:
    """CLS in front of every group: [B, T+1, P, N, D] for time, [B, T, P+1, N, D] for space."""
    patches = patch_view(tokens_BSND, layout)
    cls_token = tokens_BSND[:, :1, None]
    if frames_first:
        return torch.cat([cls_token.expand(-1, 1, layout.patches, -1, -1), patches], dim=1)
    return torch.cat([cls_token.expand(-1, layout.frames, 1, -1, -1), patches], dim=2)


def _space_groups(qkv_BS3ND: Tensor, layout: Layout) -> Tensor:
    """A frame's tokens -> [B, T, P, N, D]; frames are folded into the batch."""
    query = patch_view(qkv_BS3ND[:, :, 0], layout)
    key, value = (_keys_with_cls(qkv_BS3ND[:, :, index], layout, frames_first=False) for index in (1, 2))
    out = scaled_dot_product_attention(
        query.flatten(0, 1).transpose(1, 2), key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1).transpose(1, 2)
    )
    return out.transpose(1, 2).unflatten(0, (layout.batch, layout.frames))


def attention_sdpa(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens -> [B, S, E]; fp32, bf16 or fp16; differentiable through autograd."""
    if axis == "space" and layout.frames == 1:
        query, key, value = (part.transpose(1, 2) for part in qkv_BS3ND.unbind(2))
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    groups = _time_groups(qkv_BS3ND, layout) if axis == "time" else _space_groups(qkv_BS3ND, layout)
    patches_BSE = groups.reshape(layout.batch, layout.tokens - 1, layout.width)
    return torch.cat([cls_sdpa(qkv_BS3ND, layout), patches_BSE], dim=1)
