"""CLIP2Video written again for tests from its equations: one clip, one caption and one head at a time, no batches.

It works on a released state dict (names of pytorch_model.bin.N) and shares no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]
HEAD_WIDTH = 64


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, x: Tensor, head_masks: list[Tensor]) -> Tensor:
    """Self-attention of one sequence [S, D]; head h adds head_masks[h] [S, S] to its scores."""
    width = x.shape[-1]
    query, key, value = (x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]).chunk(3, dim=-1)
    outputs = []
    for head in range(width // HEAD_WIDTH):
        part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        scores = query[:, part] @ key[:, part].T / math.sqrt(HEAD_WIDTH) + head_masks[head]
        outputs.append(scores.softmax(-1) @ value[:, part])
    return torch.cat(outputs, -1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def transformer(state: State, name: str, x: Tensor, head_masks: list[Tensor], eps: float) -> Tensor:
    layer = 0
    while f"{name}.resblocks.{layer}.ln_1.weight" in state:
        block = f"{name}.resblocks.{layer}"
        x = x + attention(state, f"{block}.attn", layer_norm(state, f"{block}.ln_1", x, eps), head_masks)
        hidden = layer_norm(state, f"{block}.ln_2", x, eps) @ state[f"{block}.mlp.c_fc.weight"].T
        hidden = hidden + state[f"{block}.mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
        layer += 1
    return x


def no_masks(state: State, name: str, tokens: int) -> list[Tensor]:
    heads = state[f"{name}.resblocks.0.ln_1.weight"].numel() // HEAD_WIDTH
    return [torch.zeros(tokens, tokens)] * heads


def frame_embedding(state: State, image: Tensor) -> Tensor:
    """CLIP's image tower on one frame [3, R, R] -> [E]."""
    filters = state["clip.visual.conv1.weight"]
    patches = F.conv2d(image[None], filters, stride=filters.shape[-1])
    x = torch.cat([state["clip.visual.class_embedding"][None], patches[0].flatten(1).T])
    x = layer_norm(state, "clip.visual.ln_pre", x + state["clip.visual.positional_embedding"], 1e-5)
    x = transformer(state, "clip.visual.transformer", x, no_masks(state, "clip.visual.transformer", len(x)), 1e-5)
    return layer_norm(state, "clip.visual.ln_post", x[0], 1e-5) @ state["clip.visual.proj"]


def token_outputs(state: State, ids: Tensor) -> Tensor:
    """CLIP's text tower on one caption [L] -> every token's projected output [L, E]."""
    x = state["clip.token_embedding.weight"][ids] + state["clip.positional_embedding"][: len(ids)]
    causal = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    heads = x.shape[-1] // HEAD_WIDTH
    x = transformer(state, "clip.transformer", x, [causal] * heads, 1e-5)
    return layer_norm(state, "clip.ln_final", x, 1e-5) @ state["clip.text_projection"]


def penalties(masks: list[Tensor], clip: int, heads: int, compatible: bool) -> list[Tensor]:
    """Score masks of one clip's heads; the released code's tiling takes them from other clips."""
    found = []
    for head in range(heads):
        owner = (clip * heads + head) % len(masks) if compatible else clip
        mask = masks[owner]
        if not compatible and not mask.any():
            mask = torch.ones_like(mask)  # all keys masked alike: softmax does not see a constant
        found.append(((1 - mask) * -1e6).expand(len(mask), len(mask)))
    return found


def with_differences(
    state: State, frames: list[Tensor], masks: list[Tensor], clip: int, compatible: bool
) -> tuple[Tensor, list[Tensor]]:
    """The Temporal Difference Block on clip `clip` -> (tokens [2n-1, E], every clip's mask of its 2n-1 tokens)."""
    x, mask_rows = frames[clip], masks
    places, types = state["frame_position_embeddings.weight"], state["type_position_embeddings.weight"]
    n, heads = len(x), x.shape[-1] // HEAD_WIDTH
    differences = torch.stack([x[j + 1] - x[j] + places[j + 1] for j in range(n - 1)])
    head_masks = penalties([mask[1:] for mask in mask_rows], clip, heads, compatible)
    differences = transformer(state, "frame2t_attention", differences, head_masks, 1e-12)
    differences = 2 * torch.sigmoid(layer_norm(state, "trans_layernorm", differences, 1e-5)) - 1
    tokens = []
    for j in range(n):
        tokens.append(x[j] + places[j] + types[1])
        if j < n - 1:
            tokens.append(differences[j] + places[j] + types[0])
    token_masks = [torch.stack([mask[s // 2] for s in range(2 * n - 1)]) for mask in mask_rows]
    return torch.stack(tokens), token_masks


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def alignment(state: State, tokens: Tensor, mask: Tensor) -> Tensor:
    weight, center = state["weight_center"], state["emb_center"]
    shares = (tokens @ weight.T).softmax(-1)
    gathered = []
    for k in range(len(weight)):
        total = torch.zeros_like(center[k])
        for n in range(len(tokens)):
            total = total + mask[n] * shares[n, k] * (tokens[n] - center[k])
        gathered.append(unit(total))
    return unit(torch.stack(gathered).mean(0))


def video_vectors(
    state: State, frames: list[Tensor], masks: list[Tensor], clip: int, compatible: bool
) -> tuple[Tensor, Tensor]:
    """(global, aligned) vectors of one clip, from every clip's frame embeddings [n, E]."""
    heads = frames[clip].shape[-1] // HEAD_WIDTH
    tokens, token_masks = with_differences(state, frames, masks, clip, compatible)
    z = transformer(state, "transformerClip", tokens, penalties(token_masks, clip, heads, compatible), 1e-12)
    z = z[0::2] + frames[clip]
    mask = masks[clip]
    whole = unit((unit(z) * mask[:, None]).sum(0) / mask.sum())

    sparse, sparse_masks = [x[0::2] for x in frames], [mask[0::2] for mask in masks]
    tokens, token_masks = with_differences(state, sparse, sparse_masks, clip, compatible)
    q = transformer(state, "actionClip", tokens, penalties(token_masks, clip, heads, compatible), 1e-12)
    q = q[0::2] + sparse[clip]
    return whole, alignment(state, torch.cat([frames[clip], q]), torch.cat([mask, sparse_masks[clip]]))


def plain_similarity(
    state: State, ids: Tensor, text_mask: Tensor, video: Tensor, frame_mask: Tensor, *, compatible: bool
) -> Tensor:
    """Both similarities [2, Q, V], times exp(logit scale)."""
    masks = [row.float() for row in frame_mask]
    frames = [torch.stack([frame_embedding(state, image) for image in clip]) for clip in video]
    clips = [video_vectors(state, frames, masks, clip, compatible) for clip in range(len(video))]
    scale = state["clip.logit_scale"].exp()
    rows: list[list[list[Tensor]]] = [[], []]
    for caption, mask in zip(ids, text_mask, strict=True):
        tokens = token_outputs(state, caption)
        end = unit(tokens[int(caption.argmax())])
        words = mask.float().clone()
        words[0] = 0
        aligned = alignment(state, tokens, words)
        rows[0].append([scale.squeeze() * (end @ whole) for whole, _ in clips])
        rows[1].append([scale.squeeze() * (aligned @ other) for _, other in clips])
    return torch.tensor([[[float(value) for value in row] for row in side] for side in rows])
