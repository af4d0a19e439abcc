"""CLIP's towers and CLIP2Video as their released code computes them: what model_step.py compares with.

Written from the equations with PyTorch's own layers: convolution, LayerNorm, nn.MultiheadAttention without weights,
QuickGELU as two operators, additive masks for every head, the last block whole. Parameter names are the released ones,
so that it shares a state dict with frozen_fast's models. Axis letters: B sequences, S tokens, D width, V clips, T
frames, L text tokens, N heads, K centres.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.models.clip.clip_towers import ClipSize

MASKED = -1e6


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        return x * torch.sigmoid(1.702 * x)


class ReleasedBlock(nn.Module):
    """Attention and MLP, each on a normalised input."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        layers = {"c_fc": nn.Linear(width, hidden), "gelu": QuickGelu(), "c_proj": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, D] -> [B, S, D]; mask [S, S] or [B*N, S, S], added to the scores."""
        normed = self.ln_1(x_BSD)
        x_BSD = x_BSD + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x_BSD + self.mlp(self.ln_2(x_BSD))


class ReleasedTransformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.resblocks = nn.ModuleList(ReleasedBlock(width, heads, hidden, eps) for _ in range(depth))

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        for block in self.resblocks:
            x_BSD = block(x_BSD, mask)
        return x_BSD


class ReleasedImageTower(nn.Module):
    """Frames -> the projected CLS token of each."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        width, patches = size.image_width, (size.resolution // size.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, size.patch, stride=size.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ReleasedTransformer(width, size.image_depth, size.image_heads, size.image_hidden)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, size.embedding))

    def forward(self, video_VTCHW: Tensor) -> Tensor:
        """[V, T, 3, H, W] -> [V, T, E]."""
        grid = self.conv1(video_VTCHW.flatten(0, 1)).flatten(2).transpose(1, 2)
        cls_rows = self.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
        x_BSD = self.ln_pre(torch.cat([cls_rows, grid], dim=1) + self.positional_embedding)
        frames_BE = self.ln_post(self.transformer(x_BSD)[:, 0]) @ self.proj
        return frames_BE.unflatten(0, video_VTCHW.shape[:2])


class ReleasedTextTower(nn.Module):
    """Token ids -> every token's projected output."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        width = size.text_width
        self.token_embedding = nn.Embedding(size.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(size.context, width))
        self.transformer = ReleasedTransformer(width, size.text_depth, size.text_heads, size.text_hidden)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, size.embedding))

    def forward(self, ids_BL: Tensor) -> Tensor:
        """[B, L] -> [B, L, E]."""
        length = ids_BL.shape[1]
        causal = torch.full((length, length), float("-inf"), device=ids_BL.device).triu(1)
        x_BSD = self.transformer(self.token_embedding(ids_BL) + self.positional_embedding[:length], causal)
        return self.ln_final(x_BSD) @ self.text_projection


class ReleasedClip(ReleasedTextTower):
    """Both towers under OpenAI's names."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__(size)
        self.visual = ReleasedImageTower(size)
        self.logit_scale = nn.Parameter(torch.zeros(1))


class ReleasedClip4Clip(nn.Module):
    """CLIP4Clip's meanP: the mean of a clip's normalised frame embeddings."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        self.visual = ReleasedImageTower(size)

    def forward(self, video_VTCHW: Tensor) -> Tensor:
        """[V, T, 3, H, W] -> [V, E]."""
        return F.normalize(self.visual(video_VTCHW).float(), dim=-1).mean(dim=1)


class ReleasedCaptions(nn.Module):
    """CLIP's text tower where the dual encoder's is."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        self.encoder = ReleasedTextTower(size)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L] -> [B, E], at the end-of-text token."""
        return end_of_text(self.encoder(ids_BL), ids_BL)


class ReleasedClip2Video(nn.Module):
    """CLIP2Video with the right masks (every clip its own)."""

    def __init__(self, size: ClipSize, centers: int, temporal_depth: int) -> None:
        super().__init__()
        self.clip = ReleasedClip(size)
        width, heads, eps = size.embedding, size.text_heads, 1e-12
        self.frame_position_embeddings = nn.Embedding(size.context, width)
        self.type_position_embeddings = nn.Embedding(2, width)
        self.transformerClip = ReleasedTransformer(width, temporal_depth, heads, 4 * width, eps)
        self.frame2t_attention = ReleasedTransformer(width, 1, heads, 4 * width, eps)
        self.actionClip = ReleasedTransformer(width, 1, heads, 4 * width, eps)
        self.trans_layernorm = nn.LayerNorm(width)
        self.weight_center = nn.Parameter(torch.zeros(centers, width))
        self.emb_center = nn.Parameter(torch.zeros(centers, width))

    def forward(self, video_VTCHW: Tensor, frame_mask_VT: Tensor, ids_BL: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Both similarities [2, B, V], times exp(logit scale)."""
        tokens_BLE = self.clip(ids_BL).float()
        words_BL = torch.cat([torch.zeros_like(text_mask_BL[:, :1]), text_mask_BL[:, 1:]], dim=1).float()
        text = F.normalize(end_of_text(tokens_BLE, ids_BL), dim=-1), self.align(tokens_BLE, words_BL)
        video = self.clip_vectors(video_VTCHW, frame_mask_VT.float())
        return self.clip.logit_scale.exp() * torch.stack([a @ b.t() for a, b in zip(text, video, strict=True)])

    def clip_vectors(self, video_VTCHW: Tensor, mask_VT: Tensor) -> tuple[Tensor, Tensor]:
        """(global, aligned) vectors, each [V, E] of length 1."""
        frames_VTE = self.clip.visual(video_VTCHW).float()
        whole = self.over_time(self.transformerClip, frames_VTE, mask_VT)
        sparse_VTE, sparse_mask = frames_VTE[:, ::2], mask_VT[:, ::2]
        action = self.over_time(self.actionClip, sparse_VTE, sparse_mask)
        weights = mask_VT[..., None]
        mean_VE = (F.normalize(whole, dim=-1) * weights).sum(1) / weights.sum(1)
        both, both_mask = torch.cat([frames_VTE, action], 1), torch.cat([mask_VT, sparse_mask], 1)
        return F.normalize(mean_VE, dim=-1), self.align(both, both_mask)

    def over_time(self, transformer: ReleasedTransformer, frames_VTE: Tensor, mask_VT: Tensor) -> Tensor:
        """Frames with their differences between them through a transformer, plus the frames: [V, T, E]."""
        frames = frames_VTE.shape[1]
        position = self.frame_position_embeddings(torch.arange(frames, device=frames_VTE.device))
        kind = self.type_position_embeddings.weight
        changes = frames_VTE[:, 1:] - frames_VTE[:, :-1] + position[1:]
        changes = self.frame2t_attention(changes, spread(mask_VT[:, 1:], self.frame2t_attention.heads))
        changes = 2 * torch.sigmoid(self.trans_layernorm(changes)) - 1
        batch, _, width = frames_VTE.shape
        tokens = frames_VTE.new_zeros(batch, 2 * frames - 1, width)
        tokens[:, ::2] = frames_VTE + position + kind[1]
        tokens[:, 1::2] = (changes + position[:-1] + kind[0]).to(tokens.dtype)
        mask = torch.stack([mask_VT, mask_VT], dim=2).flatten(1)[:, :-1]
        return transformer(tokens, spread(mask, transformer.heads))[:, ::2] + frames_VTE

    def align(self, tokens_BSE: Tensor, mask_BS: Tensor) -> Tensor:
        """Tokens gathered at the shared centres: [B, E] of length 1."""
        shares_BSK = (tokens_BSE @ self.weight_center.t()).softmax(-1) * mask_BS[..., None]
        residual = tokens_BSE[:, :, None] - self.emb_center
        gathered_BKE = (shares_BSK[..., None] * residual).sum(1)
        return F.normalize(F.normalize(gathered_BKE, dim=-1).mean(1), dim=-1)


def spread(mask_VS: Tensor, heads: int) -> Tensor:
    """A mask's scores for every head and query: [V, S] -> [V*N, S, S]."""
    scores = (1.0 - mask_VS) * MASKED
    return scores[:, None].expand(-1, mask_VS.shape[1], -1).repeat_interleave(heads, dim=0)


def end_of_text(tokens_BLE: Tensor, ids_BL: Tensor) -> Tensor:
    """[B, L, E] -> [B, E] at the token with the largest id."""
    return tokens_BLE[torch.arange(len(ids_BL), device=ids_BL.device), ids_BL.argmax(dim=-1)]
