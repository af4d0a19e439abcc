"""Divided attention for CPUs: hand-written forward and backward over cache-sized pieces of the batch.

Nothing is regrouped in main memory. A piece of the batch (about PIECE_BYTES of qkv) is read once; what is
made from it stays in cache. The time axis is computed in fp32 whatever the input's dtype; at one frame the
softmax over (CLS, self) is a sigmoid, so no matrix product is left. The space axis is one batched matrix
product per frame in the input's dtype; at one frame a frame and CLS are all tokens, so the CLS row needs no
pass of its own. The probabilities are kept for the backward pass (in the input's dtype on the space axis).

Axis letters: see frozen_kernels.attention.qkv_layout; c is a piece of B.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from frozen_kernels.attention.qkv_layout import Layout, patch_view, read_layout
from frozen_kernels.products.choice import product, scaled_product

PIECE_BYTES = 2 << 20


def _pieces(layout: Layout) -> Iterator[slice]:
    """Slices of the batch whose fp32 qkv is about PIECE_BYTES."""
    rows = max(1, PIECE_BYTES // (layout.tokens * 3 * layout.width * 4))
    for start in range(0, layout.batch, rows):
        yield slice(start, min(start + rows, layout.batch))


def _heads_first(tokens_cSND: Tensor) -> Tensor:
    """[c, S, N, D] -> [c*N, S, D]; a view when c is 1."""
    return tokens_cSND.transpose(1, 2).flatten(0, 1)


def _tokens_first(rows: Tensor, heads: int) -> Tensor:
    """[c*N, S, D] -> [c, S, N, D], a view."""
    return rows.unflatten(0, (-1, heads)).transpose(1, 2)


# The CLS row, fp32 -------------------------------------------------------------------------------------------


def _cls_forward(x: Tensor, layout: Layout, out_cND: Tensor) -> Tensor:
    """CLS over all tokens of the fp32 piece x [c, S, 3, N, D]; fills out, returns probabilities [c*N, 1, S]."""
    query, key, value = (_heads_first(part) for part in (x[:, :1, 0], x[:, :, 1], x[:, :, 2]))
    probabilities = scaled_product(query, key.transpose(1, 2), layout.scale).softmax(dim=-1)
    out_cND.copy_(product(probabilities, value).view_as(out_cND))
    return probabilities


def _cls_backward(grad_cSND: Tensor, x: Tensor, probabilities: Tensor, layout: Layout, grad_x: Tensor) -> None:
    """Gradients of the CLS row; sets grad_x's keys and values of all tokens and the CLS query."""
    key, value = (_heads_first(x[:, :, index]) for index in (1, 2))
    grad_out = _heads_first(grad_cSND[:, :1])
    grad_probabilities = product(grad_out, value.transpose(1, 2))
    grad_scores = _softmax_backward(grad_probabilities, probabilities).mul_(layout.scale)
    grad_x[:, :1, 0].copy_(_tokens_first(product(grad_scores, key), layout.heads))
    by_token = (-1, layout.heads, layout.tokens)
    torch.mul(grad_scores.view(by_token).transpose(1, 2)[..., None], x[:, :1, 0], out=grad_x[:, :, 1])
    torch.mul(probabilities.view(by_token).transpose(1, 2)[..., None], grad_cSND[:, :1], out=grad_x[:, :, 2])


def _softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Gradient of softmax over the last axis, p * (dp - sum p dp), in one pass."""
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


# Time axis, fp32 ---------------------------------------------------------------------------------------------


def _one_frame_forward(x: Tensor, layout: Layout, out_cSND: Tensor, saved: Tensor | None) -> None:
    """A patch over (CLS, itself): p = sigmoid(scale q.(k - k_cls)); p [c, P, N] goes into saved."""
    query, key, value = x[:, 1:, 0], x[:, 1:, 1], x[:, 1:, 2]
    product = (key - x[:, :1, 1]).mul_(query)
    on_itself = product.sum(dim=-1).mul_(layout.scale).sigmoid_()
    torch.lerp(x[:, :1, 2], value, on_itself[..., None], out=out_cSND[:, 1:])
    if saved is not None:
        saved.copy_(on_itself)


def _one_frame_backward(grad: Tensor, x: Tensor, on_itself: Tensor, layout: Layout, grad_x: Tensor) -> None:
    """Gradients of _one_frame_forward, added to the keys' and values' gradients that the CLS row has set."""
    query, grad_out = x[:, 1:, 0], grad[:, 1:]
    product = (x[:, 1:, 2] - x[:, :1, 2]).mul_(grad_out)
    slope = on_itself * (1 - on_itself) * layout.scale
    grad_score = product.sum(dim=-1).mul_(slope)
    torch.sub(x[:, 1:, 1], x[:, :1, 1], out=product)
    torch.mul(product, grad_score[..., None], out=grad_x[:, 1:, 0])
    grad_x[:, 1:, 1].addcmul_(query, grad_score[..., None])
    grad_x[:, 1:, 2].addcmul_(grad_out, on_itself[..., None])
    grad_x[:, :1, 1].sub_(_weighted_sum(grad_score, query, layout))
    grad_x[:, :1, 2].add_(_weighted_sum(1 - on_itself, grad_out, layout))


def _weighted_sum(weights_cPN: Tensor, rows_cPND: Tensor, layout: Layout) -> Tensor:
    """Sum over positions of weight times row -> [c, 1, N, D]."""
    weights = weights_cPN.transpose(1, 2).flatten(0, 1)[:, None]
    return _tokens_first(product(weights, _heads_first(rows_cPND)), layout.heads)


def _position_slices(layout: Layout) -> Iterator[slice]:
    """Slices of the positions of a clip whose fp32 qkv is about PIECE_BYTES."""
    count = max(1, PIECE_BYTES // (layout.frames * 3 * layout.width * 4))
    for start in range(0, layout.patches, count):
        yield slice(start, min(start + count, layout.patches))


def _over_time(tokens_cSND: Tensor, layout: Layout, positions: slice, *, with_cls: bool) -> Tensor:
    """One group per position and head: [c*P*N, T(+1), D], contiguous, CLS in front if asked for."""
    patches = patch_view(tokens_cSND, layout)[:, :, positions].permute(0, 2, 3, 1, 4)
    if not with_cls:
        return patches.reshape(-1, layout.frames, layout.head_width)
    groups = patches.new_empty(*patches.shape[:3], layout.frames + 1, layout.head_width)
    groups[:, :, :, 0] = tokens_cSND[:, :1]
    groups[:, :, :, 1:] = patches
    return groups.view(-1, layout.frames + 1, layout.head_width)


def _several_frames_forward(x: Tensor, layout: Layout, out_cSND: Tensor, saved: Tensor | None) -> None:
    """A patch over CLS and its position in all frames; probabilities [c, P, N, T, T+1] go into saved."""
    for positions in _position_slices(layout):
        query = _over_time(x[:, :, 0], layout, positions, with_cls=False)
        key, value = (_over_time(x[:, :, index], layout, positions, with_cls=True) for index in (1, 2))
        probabilities = scaled_product(query, key.transpose(1, 2), layout.scale).softmax(dim=-1)
        shape = (x.shape[0], -1, layout.heads, layout.frames)
        groups = product(probabilities, value).view(*shape, layout.head_width)
        patch_view(out_cSND, layout)[:, :, positions].copy_(groups.permute(0, 3, 1, 2, 4))
        if saved is not None:
            saved[:, positions].copy_(probabilities.view(*shape, layout.frames + 1))


def _several_frames_backward(grad: Tensor, x: Tensor, saved: Tensor, layout: Layout, grad_x: Tensor) -> None:
    """Gradients of _several_frames_forward, added to those that the CLS row has set."""
    for positions in _position_slices(layout):
        query, grad_out = (_over_time(tokens, layout, positions, with_cls=False) for tokens in (x[:, :, 0], grad))
        key, value = (_over_time(x[:, :, index], layout, positions, with_cls=True) for index in (1, 2))
        probabilities = saved[:, positions].reshape(-1, layout.frames, layout.frames + 1)
        grad_scores = _softmax_backward(product(grad_out, value.transpose(1, 2)), probabilities)
        shape = (x.shape[0], -1, layout.heads)
        grad_query = scaled_product(grad_scores, key, layout.scale).view(*shape, layout.frames, layout.head_width)
        patch_view(grad_x[:, :, 0], layout)[:, :, positions].copy_(grad_query.permute(0, 3, 1, 2, 4))
        grad_key = scaled_product(grad_scores.transpose(1, 2), query, layout.scale)
        grad_value = product(probabilities.transpose(1, 2), grad_out)
        for index, grads in ((1, grad_key), (2, grad_value)):
            groups = grads.view(*shape, layout.frames + 1, layout.head_width)
            grad_x[:, 0, index].add_(groups[:, :, :, 0].sum(dim=1))
            patches = patch_view(grad_x[:, :, index], layout)[:, :, positions]
            patches.add_(groups[:, :, :, 1:].permute(0, 3, 1, 2, 4))


# Space axis, input dtype -------------------------------------------------------------------------------------


def _frame_rows(layout: Layout, frame: int) -> slice:
    """The queries of a frame: its patches, and CLS as well when there is no other frame."""
    start = 1 + frame * layout.patches
    return slice(0 if layout.frames == 1 else start, start + layout.patches)


def _frame_keys(tokens_cSND: Tensor, layout: Layout, frame: int) -> Tensor:
    """CLS and the patches of a frame -> [c*N, P+1, D]; a view in the first frame of a single clip."""
    start = 1 + frame * layout.patches
    patches = tokens_cSND[:, start : start + layout.patches]
    whole = tokens_cSND[:, : 1 + layout.patches] if frame == 0 else torch.cat([tokens_cSND[:, :1], patches], dim=1)
    return _heads_first(whole)


def _frame_forward(x: Tensor, layout: Layout, frame: int, out_cSND: Tensor, saved: Tensor | None) -> None:
    """The patches of one frame over CLS and that frame; probabilities [c*N, queries, P+1] go into saved."""
    rows = _frame_rows(layout, frame)
    key, value = (_frame_keys(x[:, :, index], layout, frame) for index in (1, 2))
    scores = scaled_product(_heads_first(x[:, rows, 0]), key.transpose(1, 2), layout.scale)
    probabilities = scores.softmax(dim=-1) if saved is None else torch.softmax(scores, dim=-1, out=saved)
    out_cSND[:, rows].copy_(_tokens_first(product(probabilities, value), layout.heads))


def _frame_backward(
    grad: Tensor, x: Tensor, probabilities: Tensor, layout: Layout, frame: int, grad_x: Tensor
) -> None:
    """Gradients of _frame_forward: sets the queries', adds to the keys' and values' (set at one frame)."""
    rows = _frame_rows(layout, frame)
    key, value = (_frame_keys(x[:, :, index], layout, frame) for index in (1, 2))
    query, grad_out = _heads_first(x[:, rows, 0]), _heads_first(grad[:, rows])
    grad_scores = _softmax_backward(product(grad_out, value.transpose(1, 2)), probabilities)
    grad_query = scaled_product(grad_scores, key, layout.scale)
    grad_x[:, rows, 0].copy_(_tokens_first(grad_query, layout.heads))
    grad_key = scaled_product(grad_scores.transpose(1, 2), query, layout.scale)
    grad_value = product(probabilities.transpose(1, 2), grad_out)
    for index, grads in ((1, grad_key), (2, grad_value)):
        tokens = _tokens_first(grads, layout.heads)
        if layout.frames == 1:
            grad_x[:, :, index].copy_(tokens)
            continue
        start = 1 + frame * layout.patches
        grad_x[:, :1, index].add_(tokens[:, :1])
        grad_x[:, start : start + layout.patches, index].add_(tokens[:, 1:])


# The whole batch ---------------------------------------------------------------------------------------------


def _saved_shapes(layout: Layout, axis: str, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the kept probabilities: the patches' and the CLS row's (empty where there are none)."""
    if not keep:
        return (0,), (0,)
    cls_shape = (layout.batch * layout.heads, 1, layout.tokens)
    if axis == "time" and layout.frames == 1:
        return (layout.batch, layout.patches, layout.heads), cls_shape
    if axis == "time":
        return (layout.batch, layout.patches, layout.heads, layout.frames, layout.frames + 1), cls_shape
    queries = layout.patches if layout.frames > 1 else layout.tokens
    patches_shape = (layout.frames, layout.batch * layout.heads, queries, layout.patches + 1)
    return patches_shape, cls_shape if layout.frames > 1 else (0,)


def _empty_saved(qkv: Tensor, layout: Layout, axis: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Room for the kept probabilities: fp32 on the time axis and for CLS, the input's dtype on the space axis."""
    patch_shape, cls_shape = _saved_shapes(layout, axis, keep)
    saved = qkv.new_empty(patch_shape, dtype=torch.float32 if axis == "time" else qkv.dtype)
    return saved, qkv.new_empty(cls_shape, dtype=torch.float32)


def _rows_of(saved: Tensor, rows: slice, batch: int) -> Tensor:
    """The part of a kept tensor, batch folded into axis 0, that belongs to a piece."""
    per_row = saved.shape[0] // batch
    return saved[rows.start * per_row : rows.stop * per_row]


@torch.library.custom_op("frozen_kernels::batched_attention", mutates_args=(), device_types="cpu")
def batched_forward(qkv: Tensor, num_frames: int, axis: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, E]; with keep also the patches' and the CLS row's probabilities, otherwise empty tensors."""
    layout = read_layout(qkv, num_frames, axis)
    out = qkv.new_empty(layout.batch, layout.tokens, layout.heads, layout.head_width)
    saved, cls_saved = _empty_saved(qkv, layout, axis, keep)
    with torch.autocast("cpu", enabled=False):
        for rows in _pieces(layout):
            piece, piece_out = qkv[rows], out[rows]
            if axis == "time" or layout.frames > 1:
                in_fp32 = piece.float()
                probabilities = _cls_forward(in_fp32, layout, piece_out[:, 0])
                if keep:
                    _rows_of(cls_saved, rows, layout.batch).copy_(probabilities)
            if axis == "space":
                for frame in range(layout.frames):
                    kept = _rows_of(saved[frame], rows, layout.batch) if keep else None
                    _frame_forward(piece, layout, frame, piece_out, kept)
                continue
            direct = out.dtype == torch.float32
            target = piece_out if direct else torch.empty_like(piece_out, dtype=torch.float32)
            forward = _one_frame_forward if layout.frames == 1 else _several_frames_forward
            forward(in_fp32, layout, target, _rows_of(saved, rows, layout.batch) if keep else None)
            if not direct:
                piece_out[:, 1:].copy_(target[:, 1:])
    return out.flatten(2), saved, cls_saved


@torch.library.custom_op("frozen_kernels::batched_attention_backward", mutates_args=(), device_types="cpu")
def batched_backward(
    grad_out: Tensor, qkv: Tensor, saved: Tensor, cls_saved: Tensor, num_frames: int, axis: str
) -> Tensor:
    """The gradient of qkv, packed as qkv is."""
    layout = read_layout(qkv, num_frames, axis)
    grad_out = grad_out.unflatten(2, (layout.heads, layout.head_width))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    with torch.autocast("cpu", enabled=False):
        for rows in _pieces(layout):
            merged = axis == "space" and layout.frames == 1
            piece, grad = qkv[rows], grad_out[rows]
            direct = merged or qkv.dtype == torch.float32
            grad_x = grad_qkv[rows] if direct else torch.empty_like(grad_qkv[rows], dtype=torch.float32)
            if not merged:
                in_fp32, grad_fp32 = piece.float(), grad.float()
                cls_probabilities = _rows_of(cls_saved, rows, layout.batch)
                _cls_backward(grad_fp32, in_fp32, cls_probabilities, layout, grad_x)
            if axis == "time":
                backward = _one_frame_backward if layout.frames == 1 else _several_frames_backward
                backward(grad_fp32, in_fp32, _rows_of(saved, rows, layout.batch), layout, grad_x)
            else:
                for frame in range(layout.frames):
                    probabilities = _rows_of(saved[frame], rows, layout.batch)
                    _frame_backward(grad, piece, probabilities, layout, frame, grad_x)
            if not direct:
                grad_qkv[rows].copy_(grad_x)
    return grad_qkv


@batched_forward.register_fake
def _(qkv: Tensor, num_frames: int, axis: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    layout = read_layout(qkv, num_frames, axis)
    return qkv.new_empty(layout.batch, layout.tokens, layout.width), *_empty_saved(qkv, layout, axis, keep)


@batched_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, saved: Tensor, cls_saved: Tensor, num_frames: int, axis: str) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int, str, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, ctx.num_frames, ctx.axis, keep = inputs
    assert keep, "a differentiated call keeps its probabilities"
    ctx.set_materialize_grads(False)  # nothing asks for the gradient of what is kept
    ctx.save_for_backward(qkv, output[1], output[2])


def _differentiate(ctx: Any, grad_out: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, saved, cls_saved = ctx.saved_tensors
    return batched_backward(grad_out, qkv, saved, cls_saved, ctx.num_frames, ctx.axis), None, None, None


batched_forward.register_autograd(_differentiate, setup_context=_save)


def attention_batched(qkv_BS3ND: Tensor, layout: Layout, axis: str) -> Tensor:
    """Divided attention of all tokens on a CPU -> [B, S, E]; fp32, bf16 or fp16; first derivatives only."""
    keep = torch.is_grad_enabled() and qkv_BS3ND.requires_grad
    return batched_forward(qkv_BS3ND, layout.frames, axis, keep)[0]
