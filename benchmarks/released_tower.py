"""The video tower computed as the released code of Frozen in Time computes it: what model_step.py compares with.

PyTorch's own convolution, LayerNorm, additions and GELU; positions tiled to the clip's length in every step; attention
through frozen_kernels' reference form (tokens regrouped by copies, CLS repeated into every group, scores in memory);
the last block whole. Parameter names are the released ones, so that it shares a state dict with SpaceTimeTransformer.
Axis letters: B batch, T frames, P patches per frame, S tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozen_fast.models import VideoSize
from frozen_kernels import divided_attention

LAYER_NORM_EPS = 1e-6


class ReleasedAttention(nn.Module):
    """qkv, attention, projection."""

    def __init__(self, width: int, heads: int, axis: str) -> None:
        super().__init__()
        self.heads = heads
        self.axis = axis
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor, num_frames: int) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        qkv_BS3ND = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1))
        return self.proj(divided_attention(qkv_BS3ND, num_frames, self.axis, backend="reference"))


class ReleasedMlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.act(self.fc1(x)))


class ReleasedBlock(nn.Module):
    """Time, space, MLP; the space residual adds to the block's input."""

    def __init__(self, size: VideoSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.attn = ReleasedAttention(size.width, size.heads, "space")
        self.timeattn = ReleasedAttention(size.width, size.heads, "time")
        self.norm2 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.mlp = ReleasedMlp(size.width, size.width * size.mlp_ratio)
        self.norm3 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)

    def forward(self, x_BSD: Tensor, num_frames: int) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        with_time = x_BSD + self.timeattn(self.norm3(x_BSD), num_frames)
        y_BSD = x_BSD + self.attn(self.norm1(with_time), num_frames)
        return y_BSD + self.mlp(self.norm2(y_BSD))


class ReleasedTower(nn.Module):
    """Frames -> CLS after the last norm."""

    def __init__(self, size: VideoSize, max_frames: int) -> None:
        super().__init__()
        self.size = size
        self.max_frames = max_frames
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, size.patch, stride=size.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.patches_per_frame, size.width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, size.width))
        self.blocks = nn.ModuleList(ReleasedBlock(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, D]."""
        batch, num_frames = video_BTCHW.shape[:2]
        patches = self.patch_embed["proj"](video_BTCHW.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = patches.reshape(batch, -1, self.size.width)
        x_BSD = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        tiled = self.pos_embed[:, 1:].repeat(1, self.max_frames, 1)
        repeated = self.temporal_embed.repeat_interleave(self.size.patches_per_frame, dim=1)
        positions = torch.cat([self.pos_embed[:, :1], tiled + repeated], dim=1)
        x_BSD = x_BSD + positions[:, : x_BSD.shape[1]]
        for block in self.blocks:
            x_BSD = block(x_BSD, num_frames)
        return self.norm(x_BSD)[:, 0]
