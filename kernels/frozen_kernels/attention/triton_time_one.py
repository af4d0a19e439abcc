"""Triton: temporal attention of one frame, where a patch sees CLS and itself, so its softmax is a sigmoid.

One program takes ROWS positions of one clip and head straight from the packed qkv: every element of q, k, v is
read once and every element of the result written once. The same pass leaves the block's part of the CLS row
(frozen_kernels.attention.triton_cls). The plain-PyTorch form is frozen_kernels.attention.reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_frame_forward_kernel(
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
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """One block: out = v_cls + sigmoid(scale * q.(k - k_cls)) * (v - v_cls), and the CLS query's partial sums."""
    program = tl.program_id(0)
    head = program % N
    block = (program // N) % blocks
    clip = (program // (N * blocks)).to(tl.int64)
    column = tl.arange(0, DP)
    row = block * ROWS + tl.arange(0, ROWS)
    wide = column < D
    inside = (row[:, None] < patches) & wide[None, :]
    base = qkv + clip * stride_b + head * stride_n
    offsets = (1 + row)[:, None] * stride_s + column[None, :]
    cls_query = tl.load(base + column, mask=wide, other=0.0).to(tl.float32)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)
    query = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c + offsets, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(base + 2 * stride_c + offsets, mask=inside, other=0.0).to(tl.float32)

    score = tl.sum(query * (key - cls_key[None, :]), axis=1) * scale
    on_itself = 1.0 / (1.0 + tl.exp(-score))
    result = cls_value[None, :] + on_itself[:, None] * (value - cls_value[None, :])
    out_offsets = (1 + row)[:, None] * (N * D) + head * D + column[None, :]
    tl.store(out + clip * out_stride_b + out_offsets, result, mask=inside)

    cls_scores = tl.where(row < patches, tl.sum(key * cls_query[None, :], axis=1) * scale, float("-inf"))
    top = tl.max(cls_scores, axis=0)
    weights = tl.exp(cls_scores - top)
    slot = (clip * N + head) * blocks + block
    tl.store(stats + slot * 2, top)
    tl.store(stats + slot * 2 + 1, tl.sum(weights, axis=0))
    tl.store(sums + slot * D + column, tl.sum(weights[:, None] * value, axis=0), mask=wide)


@triton.jit
def one_frame_backward_kernel(
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
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of a block's queries, keys and values (CLS's query included), and its parts of CLS's own."""
    program = tl.program_id(0)
    head = program % N
    block = (program // N) % blocks
    clip = (program // (N * blocks)).to(tl.int64)
    column = tl.arange(0, DP)
    row = block * ROWS + tl.arange(0, ROWS)
    wide = column < D
    inside = (row[:, None] < patches) & wide[None, :]
    base = qkv + clip * stride_b + head * stride_n
    offsets = (1 + row)[:, None] * stride_s + column[None, :]
    cls_query = tl.load(base + column, mask=wide, other=0.0).to(tl.float32)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)
    query = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c + offsets, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(base + 2 * stride_c + offsets, mask=inside, other=0.0).to(tl.float32)
    grad_base = grad_out + clip * out_stride_b + head * D
    cls_grad = tl.load(grad_base + column, mask=wide, other=0.0).to(tl.float32)
    grad_offsets = (1 + row)[:, None] * (N * D) + column[None, :]
    grad = tl.load(grad_base + grad_offsets, mask=inside, other=0.0).to(tl.float32)
    clip_head = clip * N + head

    key_step = key - cls_key[None, :]
    on_itself = 1.0 / (1.0 + tl.exp(-tl.sum(query * key_step, axis=1) * scale))
    on_cls = 1.0 - on_itself
    grad_weight = tl.sum(grad * (value - cls_value[None, :]), axis=1)
    grad_score = grad_weight * on_itself * on_cls * scale

    cls_scores = tl.sum(key * cls_query[None, :], axis=1) * scale
    cls_weights = tl.where(row < patches, tl.exp(cls_scores - tl.load(lse + clip_head)), 0.0)
    cls_grad_weights = tl.sum(value * cls_grad[None, :], axis=1)
    cls_grad_scores = cls_weights * (cls_grad_weights - tl.load(delta + clip_head)) * scale

    grad_query = grad_score[:, None] * key_step
    grad_key = grad_score[:, None] * query + cls_grad_scores[:, None] * cls_query[None, :]
    grad_value = on_itself[:, None] * grad + cls_weights[:, None] * cls_grad[None, :]
    target = grad_qkv + clip * grad_stride_b + head * D + (1 + row)[:, None] * grad_stride_s + column[None, :]
    tl.store(target, grad_query, mask=inside)
    tl.store(target + grad_stride_c, grad_key, mask=inside)
    tl.store(target + 2 * grad_stride_c, grad_value, mask=inside)

    part = (clip_head * blocks + block) * D + column
    tl.store(query_parts + part, tl.sum(cls_grad_scores[:, None] * key, axis=0), mask=wide)
    tl.store(key_parts + part, -tl.sum(grad_score[:, None] * query, axis=0), mask=wide)
    tl.store(value_parts + part, tl.sum(on_cls[:, None] * grad, axis=0), mask=wide)
