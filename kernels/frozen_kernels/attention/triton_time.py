"""Triton: temporal attention of 2 to 16 frames.

One program takes ROWS positions of one clip and head, in all frames, straight from the packed qkv. Keys and
values are tiles [TP, ROWS, DP] in registers, time outermost, so that sums over time need no exchange between
threads; queries pass one frame at a time. Groups are tiny, so the products are elementwise: a matrix unit would
work on padding. Every element of q, k, v is read once, and the softmax is recomputed in the backward pass, so
nothing is kept for it. The same pass computes the block's part of the CLS row (frozen_kernels.attention.triton_cls).
The plain-PyTorch form is frozen_kernels.attention.reference. TP and DP are T and D rounded up to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def time_forward_kernel(
    qkv,
    out,
    stats,
    sums,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    out_stride_b,
    scale,
    patches,
    blocks,
    N,
    D,
    T: tl.constexpr,
    TP: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """A block of positions over CLS and their own frames, and the CLS query's partial sums."""
    program = tl.program_id(0)
    head = program % N
    block = (program // N) % blocks
    clip = (program // (N * blocks)).to(tl.int64)
    frame = tl.arange(0, TP)[:, None, None]
    position = block * ROWS + tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, DP)[None, None, :]
    wide = column < D
    inside = (position < patches) & wide
    base = qkv + clip * stride_b + head * stride_n
    tile = (1 + frame * patches + position) * stride_s + column
    cls_query = tl.load(base + column, mask=wide, other=0.0).to(tl.float32)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c + tile, mask=inside & (frame < T), other=0.0).to(tl.float32)
    value = tl.load(base + 2 * stride_c + tile, mask=inside & (frame < T), other=0.0).to(tl.float32)
    visible = (position < patches) & (frame < T)

    for t in range(T):
        row = 1 + t * patches + position
        query = tl.load(base + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
        on_cls = tl.sum(query * cls_key, axis=2, keep_dims=True) * scale
        scores = tl.sum(query * key, axis=2, keep_dims=True) * scale
        scores = tl.where(frame < T, scores, float("-inf"))
        top = tl.maximum(tl.max(scores, axis=0, keep_dims=True), on_cls)
        weights = tl.exp(scores - top)
        cls_weight = tl.exp(on_cls - top)
        total = tl.sum(weights, axis=0, keep_dims=True) + cls_weight
        result = (tl.sum(weights * value, axis=0, keep_dims=True) + cls_weight * cls_value) / total
        tl.store(out + clip * out_stride_b + row * (N * D) + head * D + column, result, mask=inside)

    cls_scores = tl.where(visible, tl.sum(key * cls_query, axis=2, keep_dims=True) * scale, float("-inf"))
    top = tl.max(cls_scores)
    weights = tl.exp(cls_scores - top)
    slot = (clip * N + head) * blocks + block
    tl.store(stats + slot * 2, top)
    tl.store(stats + slot * 2 + 1, tl.sum(weights))
    flat = tl.arange(0, DP)
    tl.store(sums + slot * D + flat, tl.sum(tl.sum(weights * value, axis=0), axis=0), mask=flat < D)


@triton.jit
def time_backward_kernel(
    qkv,
    grad_out,
    grad_qkv,
    query_parts,
    key_parts,
    value_parts,
    lse,
    delta,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    out_stride_b,
    grad_stride_b,
    grad_stride_s,
    grad_stride_c,
    scale,
    patches,
    blocks,
    N,
    D,
    T: tl.constexpr,
    TP: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of a block's queries, keys and values (CLS's query included), and its parts of CLS's own."""
    program = tl.program_id(0)
    head = program % N
    block = (program // N) % blocks
    clip = (program // (N * blocks)).to(tl.int64)
    frame = tl.arange(0, TP)[:, None, None]
    position = block * ROWS + tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, DP)[None, None, :]
    wide = column < D
    inside = (position < patches) & wide
    base = qkv + clip * stride_b + head * stride_n
    grad_base = grad_out + clip * out_stride_b + head * D
    target = grad_qkv + clip * grad_stride_b + head * D
    tile_row = 1 + frame * patches + position
    cls_query = tl.load(base + column, mask=wide, other=0.0).to(tl.float32)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_grad = tl.load(grad_base + column, mask=wide, other=0.0).to(tl.float32)
    tile = base + tile_row * stride_s + column
    key = tl.load(tile + stride_c, mask=inside & (frame < T), other=0.0).to(tl.float32)
    value = tl.load(tile + 2 * stride_c, mask=inside & (frame < T), other=0.0).to(tl.float32)
    visible = (position < patches) & (frame < T)
    clip_head = clip * N + head

    cls_scores = tl.sum(key * cls_query, axis=2, keep_dims=True) * scale
    cls_weights = tl.where(visible, tl.exp(cls_scores - tl.load(lse + clip_head)), 0.0)
    cls_slopes = tl.sum(value * cls_grad, axis=2, keep_dims=True) - tl.load(delta + clip_head)
    cls_grad_scores = cls_weights * cls_slopes * scale
    grad_key = cls_grad_scores * cls_query
    grad_value = cls_weights * cls_grad
    flat = tl.arange(0, DP)
    part = (clip_head * blocks + block) * D + flat
    query_part = tl.sum(tl.sum(cls_grad_scores * key, axis=0), axis=0)
    tl.store(query_parts + part, query_part, mask=flat < D)

    key_part = tl.zeros([1, ROWS, DP], dtype=tl.float32)
    value_part = tl.zeros([1, ROWS, DP], dtype=tl.float32)
    for t in range(T):
        row = 1 + t * patches + position
        query = tl.load(base + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_base + row * (N * D) + column, mask=inside, other=0.0).to(tl.float32)
        on_cls = tl.sum(query * cls_key, axis=2, keep_dims=True) * scale
        scores = tl.sum(query * key, axis=2, keep_dims=True) * scale
        scores = tl.where(frame < T, scores, float("-inf"))
        top = tl.maximum(tl.max(scores, axis=0, keep_dims=True), on_cls)
        weights = tl.exp(scores - top)
        cls_weight = tl.exp(on_cls - top)
        total = tl.sum(weights, axis=0, keep_dims=True) + cls_weight
        weights = weights / total
        cls_weight = cls_weight / total
        slopes = tl.sum(grad * value, axis=2, keep_dims=True)
        cls_slope = tl.sum(grad * cls_value, axis=2, keep_dims=True)
        mean = tl.sum(weights * slopes, axis=0, keep_dims=True) + cls_weight * cls_slope
        grad_scores = weights * (slopes - mean) * scale
        cls_grad_score = cls_weight * (cls_slope - mean) * scale
        grad_query = tl.sum(grad_scores * key, axis=0, keep_dims=True) + cls_grad_score * cls_key
        tl.store(target + row * grad_stride_s + column, grad_query, mask=inside)
        grad_key += grad_scores * query
        grad_value += weights * grad
        key_part += cls_grad_score * query
        value_part += cls_weight * grad

    grad_tile = target + tile_row * grad_stride_s + column
    tl.store(grad_tile + grad_stride_c, grad_key, mask=inside & (frame < T))
    tl.store(grad_tile + 2 * grad_stride_c, grad_value, mask=inside & (frame < T))
    tl.store(key_parts + part, tl.sum(tl.sum(key_part, axis=0), axis=0), mask=flat < D)
    tl.store(value_parts + part, tl.sum(tl.sum(value_part, axis=0), axis=0), mask=flat < D)
