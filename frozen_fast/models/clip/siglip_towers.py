"""SigLIP's image tower and text tower (Zhai et al. 2023, arXiv 2303.15343), built from CLIP's blocks.

Differences from CLIP: a learned query that attends to all patches instead of a CLS token, patches with bias, text
attention over all tokens, the tanh form of GELU, and no projection of the image side.

Axis letters: B clips or captions, T frames, C channels, H and W pixels, P patches per frame, L text tokens, D width,
E width of the common space and of the image tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_blocks import GELU_FORMS, Activation, ClipMlp, ClipTransformer
from frozen_fast.models.clip.clip_towers import check_frames
from frozen_fast.models.video.blocks import FusedOps, PatchProjection, ResidualNorm
from frozen_kernels import cls_attention

SIGLIP_NORM_EPS = 1e-6
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
PAD_ID = 1


@dataclass(frozen=True, kw_only=True)
class SiglipSize:
    """The sizes of a SigLIP model; pixels beyond the last complete patch are ignored."""

    resolution: int
    patch: int
    image_width: int
    image_depth: int
    image_heads: int
    image_hidden: int
    text_width: int
    text_depth: int
    text_heads: int
    text_hidden: int
    context: int = 64
    vocabulary: int = 32_000
    pad_id: int = PAD_ID
    activation: Activation = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.resolution < self.patch:
            raise UserError(f"resolution: got {self.resolution}; allowed: {self.patch}, a patch, or more")
        for part in ("image", "text"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if heads < 1 or width % heads:
                raise UserError(f"{part}_heads: got {heads} for width {width}; allowed: divisors of the width")
        if self.activation not in GELU_FORMS:
            raise UserError(f"activation: got {self.activation!r}; allowed: {', '.join(GELU_FORMS)}")

    @property
    def embedding(self) -> int:
        """E, the width of the common space."""
        return self.image_width


def _published(resolution: int, patch: int, width: int, depth: int, heads: int, hidden: int) -> SiglipSize:
    """Return a size whose towers have the same width and depth."""
    both = {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
    sides: dict[str, Any] = {f"{part}_{name}": value for part in ("image", "text") for name, value in both.items()}
    return SiglipSize(resolution=resolution, patch=patch, **sides)


SIGLIP_SIZES: dict[str, SiglipSize] = {
    "base-patch16-224": _published(224, 16, 768, 12, 12, 3072),
    "large-patch16-256": _published(256, 16, 1024, 24, 16, 4096),
    "so400m-patch14-384": _published(384, 14, 1152, 27, 16, 4304),
    "tiny": _published(32, 16, 128, 2, 2, 512),
}
"""Named sizes: Google's, and a tiny one for tests."""


class AttentionPooling(nn.Module):
    """A learned query attends to all patches; an MLP follows."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, fused_ops: FusedOps) -> None:
        """Initialise torch.nn.MultiheadAttention's parameters, the query, and the MLP."""
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.ln = ResidualNorm(width, fused_ops, SIGLIP_NORM_EPS)
        self.mlp = ClipMlp(width, hidden, activation, fused_ops)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, D]."""
        sizes = (x_BPD.shape[-1], 2 * x_BPD.shape[-1])
        query_weight, kv_weight = self.in_proj_weight.split(sizes)
        query_bias, kv_bias = self.in_proj_bias.split(sizes)
        query_11ND = F.linear(self.probe, query_weight, query_bias).unflatten(-1, (self.heads, -1))
        kv_BP2ND = F.linear(x_BPD, kv_weight, kv_bias).unflatten(-1, (2, self.heads, -1))
        pooled = self.out_proj(cls_attention(query_11ND.expand(len(x_BPD), -1, -1, -1), kv_BP2ND))
        pooled, normed = self.ln(pooled)
        return (pooled + self.mlp(normed))[:, 0]


class SiglipImageTower(nn.Module):
    """A ViT on single frames: frames -> the pooled embedding of each."""

    def __init__(self, size: SiglipSize, *, fused_ops: FusedOps = "auto", **options: Any) -> None:
        """Build the tower with random weights.

        Args:
            size: sizes.
            fused_ops: as in ClipTransformer.
            options: attention, checkpointed_blocks of ClipTransformer.
        """
        super().__init__()
        width = size.image_width
        self.resolution = size.resolution
        self.width = width
        self.conv1 = PatchProjection(size.patch, width)
        self.pixels_read = size.resolution - size.resolution % size.patch
        self.tokens = (size.resolution // size.patch) ** 2
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.tokens, width))
        self.transformer = ClipTransformer(
            width,
            size.image_depth,
            size.image_heads,
            hidden=size.image_hidden,
            activation=size.activation,
            eps=SIGLIP_NORM_EPS,
            fused_ops=fused_ops,
            **options,
        )
        self.ln_post = ResidualNorm(width, fused_ops, SIGLIP_NORM_EPS)
        self.head = AttentionPooling(width, size.image_heads, size.image_hidden, size.activation, fused_ops)

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed every frame separately.

        Args:
            video_BTCHW: [B, T, 3, resolution, resolution], normalised floats.

        Returns:
            [B, T, E], not normalised.

        Raises:
            ValueError: for another shape.
        """
        check_frames(video_BTCHW, self.resolution)
        read = self.pixels_read
        patches = self.conv1(video_BTCHW[..., :read, :read]).flatten(0, 1)
        _, normed = self.ln_post(*self.transformer(patches + self.positional_embedding))
        return self.head(normed).unflatten(0, video_BTCHW.shape[:2])


class SiglipTextTower(nn.Module):
    """A transformer on token ids; the last token's output is the caption's embedding."""

    def __init__(self, size: SiglipSize, *, fused_ops: FusedOps = "auto", **options: Any) -> None:
        """Build the tower with random weights.

        Args:
            size: sizes.
            fused_ops: as in ClipTransformer.
            options: attention, checkpointed_blocks of ClipTransformer.
        """
        super().__init__()
        width = size.text_width
        self.context, self.pad_id = size.context, size.pad_id
        self.token_embedding = nn.Embedding(size.vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(size.context, width))
        self.transformer = ClipTransformer(
            width,
            size.text_depth,
            size.text_heads,
            hidden=size.text_hidden,
            activation=size.activation,
            eps=SIGLIP_NORM_EPS,
            fused_ops=fused_ops,
            **options,
        )
        self.ln_final = nn.LayerNorm(width, eps=SIGLIP_NORM_EPS)
        self.head = nn.Linear(width, size.embedding)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, input_ids_BL: Tensor) -> Tensor:
        """Encode captions.

        Captions are padded to `context` tokens, and padding takes part in attention, as in Google's training.

        Args:
            input_ids_BL: L up to `context`.

        Returns:
            [B, E], the last position's output, projected; not normalised.

        Raises:
            ValueError: for longer captions.
        """
        length = input_ids_BL.shape[1]
        if length > self.context:
            raise ValueError(f"text: got {length} tokens; allowed: up to {self.context}")
        ids = F.pad(input_ids_BL, (0, self.context - length), value=self.pad_id)
        x, branch = self.transformer(self.token_embedding(ids) + self.positional_embedding)
        return self.head(self.ln_final(x[:, -1] + branch[:, -1]))
