"""Triton: spatial attention, where a patch sees CLS and the patches of its frame.

Tiled with a running softmax; CLS is not a row of any tile: its key starts the running softmax of every query,
its gradients leave each program as partial sums. The CLS query's own row comes from triton_cls;
its part of the keys' and values' gradients is added here, where their tiles are at hand. Products run in the
input's dtype and accumulate in fp32 (fp32 inputs without TF32). The plain-PyTorch form is
frozen_kernels.attention.reference. DP is D rounded up to a power of two; logs and exponentials are base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def add_product(left, right, start):
    """Add left @ right to start, in fp32. Triton's interpreter multiplies bf16 wrongly: there the tiles are widened."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, start, input_precision="ieee")


@triton.jit
def transposed_product(left, right):
    """Multiply left by right^T, in fp32; see add_product."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.jit
def space_forward_kernel(
    qkv,
    out,
    lse,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    out_stride_b,
    scale,
    frames,
    patches: tl.constexpr,
    blocks,
    N,
    D,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    """One program: ROWS queries of one frame, clip and head; leaves the log2 of their sums of exponentials."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % N
    frame = (program // (blocks * N)) % frames
    clip = (program // (blocks * N * frames)).to(tl.int64)
    column = tl.arange(0, DP)
    wide = column < D
    row = block * ROWS + tl.arange(0, ROWS)
    first = 1 + frame * patches
    base = qkv + clip * stride_b + head * stride_n
    inside = (row[:, None] < patches) & wide[None, :]
    query = tl.load(base + (first + row)[:, None] * stride_s + column[None, :], mask=inside, other=0.0)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)

    top = tl.sum(query.to(tl.float32) * cls_key[None, :], axis=1) * (scale * LOG2_E)
    total = tl.full([ROWS], 1.0, dtype=tl.float32)
    result = tl.zeros([ROWS, DP], dtype=tl.float32) + cls_value[None, :]
    for start in range(0, patches, KEYS):
        other = start + tl.arange(0, KEYS)
        key_offsets = (first + other)[:, None] * stride_s + column[None, :]
        key_inside = (other[:, None] < patches) & wide[None, :]
        key = tl.load(base + stride_c + key_offsets, mask=key_inside, other=0.0)
        value = tl.load(base + 2 * stride_c + key_offsets, mask=key_inside, other=0.0)
        scores = transposed_product(query, key) * (scale * LOG2_E)
        scores = tl.where(other[None, :] < patches, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        result = add_product(weights.to(value.dtype), value, result * shrink[:, None])
        top = new_top
    out_offsets = (first + row)[:, None] * (N * D) + head * D + column[None, :]
    tl.store(out + clip * out_stride_b + out_offsets, result / total[:, None], mask=inside)
    slot = (clip * N + head) * (frames * patches) + frame * patches + row
    tl.store(lse + slot, top + tl.log2(total), mask=row < patches)


@triton.jit
def space_backward_query_kernel(
    qkv,
    out,
    grad_out,
    grad_qkv,
    lse,
    delta,
    key_parts,
    value_parts,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    out_stride_b,
    grad_stride_b,
    grad_stride_s,
    scale,
    frames,
    patches: tl.constexpr,
    blocks,
    N,
    D,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of ROWS queries; their parts of the gradients of CLS's key and value; delta = sum(grad * out)."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % N
    frame = (program // (blocks * N)) % frames
    clip = (program // (blocks * N * frames)).to(tl.int64)
    column = tl.arange(0, DP)
    wide = column < D
    row = block * ROWS + tl.arange(0, ROWS)
    first = 1 + frame * patches
    base = qkv + clip * stride_b + head * stride_n
    inside = (row[:, None] < patches) & wide[None, :]
    out_offsets = clip * out_stride_b + (first + row)[:, None] * (N * D) + head * D + column[None, :]
    query = tl.load(base + (first + row)[:, None] * stride_s + column[None, :], mask=inside, other=0.0)
    grad = tl.load(grad_out + out_offsets, mask=inside, other=0.0)
    result = tl.load(out + out_offsets, mask=inside, other=0.0).to(tl.float32)
    cls_key = tl.load(base + stride_c + column, mask=wide, other=0.0).to(tl.float32)
    cls_value = tl.load(base + 2 * stride_c + column, mask=wide, other=0.0).to(tl.float32)
    slot = (clip * N + head) * (frames * patches) + frame * patches + row
    log_total = tl.load(lse + slot, mask=row < patches, other=0.0)
    query_fp32 = query.to(tl.float32)
    grad_fp32 = grad.to(tl.float32)
    mean = tl.sum(grad_fp32 * result, axis=1)
    tl.store(delta + slot, mean, mask=row < patches)

    on_cls = tl.exp2(tl.sum(query_fp32 * cls_key[None, :], axis=1) * (scale * LOG2_E) - log_total)
    cls_grad_score = on_cls * (tl.sum(grad_fp32 * cls_value[None, :], axis=1) - mean) * scale
    grad_query = cls_grad_score[:, None] * cls_key[None, :]
    part = (((clip * N + head) * frames + frame) * blocks + block) * D + column
    tl.store(key_parts + part, tl.sum(cls_grad_score[:, None] * query_fp32, axis=0), mask=wide)
    tl.store(value_parts + part, tl.sum(on_cls[:, None] * grad_fp32, axis=0), mask=wide)
    for start in range(0, patches, KEYS):
        other = start + tl.arange(0, KEYS)
        key_offsets = (first + other)[:, None] * stride_s + column[None, :]
        key_inside = (other[:, None] < patches) & wide[None, :]
        key = tl.load(base + stride_c + key_offsets, mask=key_inside, other=0.0)
        value = tl.load(base + 2 * stride_c + key_offsets, mask=key_inside, other=0.0)
        scores = transposed_product(query, key) * (scale * LOG2_E)
        weights = tl.exp2(scores - log_total[:, None])
        weights = tl.where(other[None, :] < patches, weights, 0.0)
        slopes = transposed_product(grad, value)
        grad_scores = weights * (slopes - mean[:, None]) * scale
        grad_query = add_product(grad_scores.to(key.dtype), key, grad_query)
    grad_offsets = (first + row)[:, None] * grad_stride_s + head * D + column[None, :]
    tl.store(grad_qkv + clip * grad_stride_b + grad_offsets, grad_query, mask=inside)


@triton.jit
def space_backward_key_kernel(
    qkv,
    grad_out,
    grad_qkv,
    lse,
    delta,
    cls_lse,
    cls_delta,
    query_parts,
    stride_b,
    stride_s,
    stride_c,
    stride_n,
    out_stride_b,
    grad_stride_b,
    grad_stride_s,
    grad_stride_c,
    scale,
    frames,
    patches: tl.constexpr,
    blocks,
    N,
    D,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of KEYS keys and values of one frame, CLS's query included; their part of that query's gradient."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % N
    frame = (program // (blocks * N)) % frames
    clip = (program // (blocks * N * frames)).to(tl.int64)
    column = tl.arange(0, DP)
    wide = column < D
    other = block * KEYS + tl.arange(0, KEYS)
    first = 1 + frame * patches
    base = qkv + clip * stride_b + head * stride_n
    grad_base = grad_out + clip * out_stride_b + head * D
    inside = (other[:, None] < patches) & wide[None, :]
    key_offsets = (first + other)[:, None] * stride_s + column[None, :]
    key = tl.load(base + stride_c + key_offsets, mask=inside, other=0.0)
    value = tl.load(base + 2 * stride_c + key_offsets, mask=inside, other=0.0)
    cls_query = tl.load(base + column, mask=wide, other=0.0).to(tl.float32)
    cls_grad = tl.load(grad_base + column, mask=wide, other=0.0).to(tl.float32)
    clip_head = clip * N + head

    key_fp32 = key.to(tl.float32)
    cls_scores = tl.sum(key_fp32 * cls_query[None, :], axis=1) * scale
    cls_weights = tl.where(other < patches, tl.exp(cls_scores - tl.load(cls_lse + clip_head)), 0.0)
    cls_slopes = tl.sum(value.to(tl.float32) * cls_grad[None, :], axis=1) - tl.load(cls_delta + clip_head)
    cls_grad_scores = cls_weights * cls_slopes * scale
    part = ((clip_head * frames + frame) * blocks + block) * D + column
    tl.store(query_parts + part, tl.sum(cls_grad_scores[:, None] * key_fp32, axis=0), mask=wide)
    grad_key = cls_grad_scores[:, None] * cls_query[None, :]
    grad_value = cls_weights[:, None] * cls_grad[None, :]
    for start in range(0, patches, ROWS):
        row = start + tl.arange(0, ROWS)
        row_inside = (row[:, None] < patches) & wide[None, :]
        query = tl.load(base + (first + row)[:, None] * stride_s + column[None, :], mask=row_inside, other=0.0)
        grad = tl.load(grad_base + (first + row)[:, None] * (N * D) + column[None, :], mask=row_inside, other=0.0)
        slot = clip_head * (frames * patches) + frame * patches + row
        log_total = tl.load(lse + slot, mask=row < patches, other=0.0)
        mean = tl.load(delta + slot, mask=row < patches, other=0.0)
        scores = transposed_product(key, query) * (scale * LOG2_E)
        weights = tl.exp2(scores - log_total[None, :])
        weights = tl.where((row[None, :] < patches) & (other[:, None] < patches), weights, 0.0)
        grad_value = add_product(weights.to(grad.dtype), grad, grad_value)
        slopes = transposed_product(value, grad)
        grad_scores = weights * (slopes - mean[None, :]) * scale
        grad_key = add_product(grad_scores.to(query.dtype), query, grad_key)
    target = grad_qkv + clip * grad_stride_b + head * D + (first + other)[:, None] * grad_stride_s + column[None, :]
    tl.store(target + grad_stride_c, grad_key, mask=inside)
    tl.store(target + 2 * grad_stride_c, grad_value, mask=inside)
