"""Triton: the CLS row of divided attention, from partial sums that other kernels leave per block of tokens.

Forward: every block of patches leaves (largest score, sum of weights, weighted sum of values) of the CLS query;
`cls_combine_kernel` joins them in a fixed order with CLS's own key. Backward: every block leaves its part of the
gradients of CLS's query, key and value; `cls_finish_kernel` adds them in a fixed order. No atomics anywhere, so
two runs give equal bits. The plain-PyTorch form is frozen_kernels.attention.reference.

Letters as in qkv_layout; DP is D rounded up to a power of two. Everything is accumulated in fp32.
Loop bounds are compile-time constants, as the interpreter wants them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cls_partial_kernel(
    qkv,
    stats,
    sums,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    scale,
    patches,
    blocks,
    N,
    D,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """One program: one block of ROWS patches of one clip and head, seen by the CLS query."""
    program = tl.program_id(0)
    head = program % N
    block = (program // N) % blocks
    clip = (program // (N * blocks)).to(tl.int64)
    column = tl.arange(0, DP)
    row = block * ROWS + tl.arange(0, ROWS)
    base = qkv + clip * stride_b + head * stride_n
    inside = (row[:, None] < patches) & (column[None, :] < D)
    offsets = (1 + row)[:, None] * stride_s + column[None, :]
    query = tl.load(base + column, mask=column < D, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c + offsets, mask=inside, other=0.0).to(tl.float32)
    scores = tl.sum(key * query[None, :], axis=1) * scale
    scores = tl.where(row < patches, scores, float("-inf"))
    top = tl.max(scores, axis=0)
    weights = tl.exp(scores - top)
    value = tl.load(base + 2 * stride_c + offsets, mask=inside, other=0.0).to(tl.float32)
    slot = (clip * N + head) * blocks + block
    tl.store(stats + slot * 2, top)
    tl.store(stats + slot * 2 + 1, tl.sum(weights, axis=0))
    tl.store(sums + slot * D + column, tl.sum(weights[:, None] * value, axis=0), mask=column < D)


@triton.jit
def cls_combine_kernel(
    qkv,
    stats,
    sums,
    out,
    lse,
    stride_b,
    stride_c,
    stride_n,
    out_stride_b,
    scale,
    blocks: tl.constexpr,
    N,
    D,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the CLS output of one clip and head, and the log of its sum of exponentials."""
    program = tl.program_id(0)
    head = program % N
    clip = (program // N).to(tl.int64)
    column = tl.arange(0, DP)
    base = qkv + clip * stride_b + head * stride_n + column
    query = tl.load(base, mask=column < D, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c, mask=column < D, other=0.0).to(tl.float32)
    result = tl.load(base + 2 * stride_c, mask=column < D, other=0.0).to(tl.float32)
    top = tl.sum(query * key, axis=0) * scale
    total = top * 0 + 1.0
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        slot = (clip * N + head) * blocks + block
        tops = tl.load(stats + slot * 2, mask=block < blocks, other=float("-inf"))
        totals = tl.load(stats + slot * 2 + 1, mask=block < blocks, other=0.0)
        parts_mask = (block[:, None] < blocks) & (column[None, :] < D)
        parts = tl.load(sums + slot[:, None] * D + column[None, :], mask=parts_mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        shrink = tl.exp(top - new_top)
        factors = tl.exp(tops - new_top)
        total = total * shrink + tl.sum(totals * factors, axis=0)
        result = result * shrink + tl.sum(parts * factors[:, None], axis=0)
        top = new_top
    tl.store(out + clip * out_stride_b + head * D + column, result / total, mask=column < D)
    tl.store(lse + clip * N + head, top + tl.log(total))


@triton.jit
def sum_parts(parts, row, blocks: tl.constexpr, D, column, DP: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of the `blocks` rows of width D that start at row * blocks, in a fixed order -> [DP]."""
    total = tl.zeros([DP], dtype=tl.float32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        mask = (block[:, None] < blocks) & (column[None, :] < D)
        offsets = (row * blocks + block)[:, None] * D + column[None, :]
        total += tl.sum(tl.load(parts + offsets, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def cls_finish_kernel(
    qkv,
    grad_out,
    grad_qkv,
    query_parts,
    key_parts,
    value_parts,
    lse,
    delta,
    stride_b,
    stride_c,
    stride_n,
    out_stride_b,
    grad_stride_b,
    grad_stride_c,
    scale,
    query_blocks: tl.constexpr,
    key_blocks: tl.constexpr,
    N,
    D,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the gradients of CLS's query, key and value in one clip and head."""
    program = tl.program_id(0)
    head = program % N
    clip = (program // N).to(tl.int64)
    row = clip * N + head
    column = tl.arange(0, DP)
    inside = column < D
    base = qkv + clip * stride_b + head * stride_n + column
    query = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(base + stride_c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(base + 2 * stride_c, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + clip * out_stride_b + head * D + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.exp(tl.sum(query * key, axis=0) * scale - tl.load(lse + row))
    grad_score = weight * (tl.sum(grad * value, axis=0) - tl.load(delta + row)) * scale
    grad_query = grad_score * key + sum_parts(query_parts, row, query_blocks, D, column, DP, CHUNK)
    grad_key = grad_score * query + sum_parts(key_parts, row, key_blocks, D, column, DP, CHUNK)
    grad_value = weight * grad + sum_parts(value_parts, row, key_blocks, D, column, DP, CHUNK)
    target = grad_qkv + clip * grad_stride_b + head * D + column
    tl.store(target, grad_query, mask=inside)
    tl.store(target + grad_stride_c, grad_key, mask=inside)
    tl.store(target + 2 * grad_stride_c, grad_value, mask=inside)
