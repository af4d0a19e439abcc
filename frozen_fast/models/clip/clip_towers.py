"""CLIP's image tower and text tower, and a module of both with the parameter names of OpenAI's checkpoints.

Axis letters: B clips or captions, T frames, C channels, H and W pixels, P patches per frame, L text tokens, D width,
E width of the common space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_blocks import CLIP_NORM_EPS, GELU_FORMS, HEAD_WIDTH, Activation, ClipTransformer
from frozen_fast.models.video.blocks import PatchProjection

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CONTEXT = 77
VOCABULARY = 49408
FIRST_LOGIT_SCALE = math.log(1 / 0.07)
LARGEST_LOGIT_SCALE = math.log(100)
"""Largest value of CLIP's learned logit scale."""


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """The sizes of a CLIP model; a file's tensors determine all but the heads' width and the activation."""

    embedding: int
    resolution: int
    patch: int
    image_width: int
    image_depth: int
    text_width: int
    text_depth: int
    image_heads: int
    text_heads: int
    image_hidden: int
    text_hidden: int
    context: int = CONTEXT
    vocabulary: int = VOCABULARY
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.resolution % self.patch:
            raise UserError(f"resolution: got {self.resolution}; allowed: multiples of patch {self.patch}")
        for part in ("image", "text"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if heads < 1 or width % heads:
                raise UserError(f"{part}_heads: got {heads} for width {width}; allowed: divisors of the width")
        if self.activation not in GELU_FORMS:
            raise UserError(f"activation: got {self.activation!r}; allowed: {', '.join(GELU_FORMS)}")


def _published(embedding: int, resolution: int, patch: int, image: tuple[int, int], text: tuple[int, int]) -> ClipSize:
    """Return a size with heads of 64 and MLPs of four times the width; image and text are (width, depth)."""
    return ClipSize(
        embedding=embedding,
        resolution=resolution,
        patch=patch,
        image_width=image[0],
        image_depth=image[1],
        image_heads=image[0] // HEAD_WIDTH,
        image_hidden=4 * image[0],
        text_width=text[0],
        text_depth=text[1],
        text_heads=text[0] // HEAD_WIDTH,
        text_hidden=4 * text[0],
    )


CLIP_SIZES: dict[str, ClipSize] = {
    "ViT-B/32": _published(512, 224, 32, (768, 12), (512, 12)),
    "ViT-B/16": _published(512, 224, 16, (768, 12), (512, 12)),
    "ViT-L/14": _published(768, 224, 14, (1024, 24), (768, 12)),
    "tiny": _published(128, 32, 16, (128, 2), (128, 4)),
}
"""Named sizes: OpenAI's, and a tiny one for tests."""


def check_frames(video_BTCHW: Tensor, side: int) -> None:
    """Refuse clips other than one or more square RGB frames of this many pixels.

    Raises:
        ValueError: naming the shape.
    """
    if video_BTCHW.dim() != 5 or tuple(video_BTCHW.shape[2:]) != (3, side, side) or 0 in video_BTCHW.shape:
        raise ValueError(f"video: got shape {list(video_BTCHW.shape)}; allowed: [B, T, 3, {side}, {side}]")


class ClipImageTower(nn.Module):
    """A ViT on single frames: frames -> the projected CLS token of each."""

    def __init__(self, size: ClipSize, **options: Any) -> None:
        """Build the tower with OpenAI's random start.

        Args:
            size: sizes.
            options: attention, fused_ops, checkpointed_blocks of ClipTransformer.
        """
        super().__init__()
        width = size.image_width
        self.resolution = size.resolution
        self.width = width
        self.conv1 = PatchProjection(size.patch, width, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.tokens = 1 + (size.resolution // size.patch) ** 2
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=CLIP_NORM_EPS)
        self.transformer = ClipTransformer(
            width, size.image_depth, size.image_heads, hidden=size.image_hidden, activation=size.activation, **options
        )
        self.ln_post = nn.LayerNorm(width, eps=CLIP_NORM_EPS)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, size.embedding))

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
        batch, frames = video_BTCHW.shape[:2]
        patches = self.conv1(video_BTCHW).flatten(0, 1)
        tokens = torch.cat([self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1), patches], dim=1)
        x, branch = self.transformer(self.ln_pre(tokens + self.positional_embedding), first_only=True)
        return F.linear(self.ln_post(x[:, 0] + branch[:, 0]), self.proj.t()).view(batch, frames, -1)


class ClipTextTower(nn.Module):
    """A causal transformer on token ids; its parameters are at the root of OpenAI's checkpoints."""

    def __init__(self, size: ClipSize, **options: Any) -> None:
        """Build the tower with OpenAI's random start.

        Args:
            size: sizes.
            options: fused_ops, checkpointed_blocks of ClipTransformer.
        """
        super().__init__()
        width = size.text_width
        self.width = width
        self.context = size.context
        self.token_embedding = nn.Embedding(size.vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(size.context, width))
        self.transformer = ClipTransformer(
            width,
            size.text_depth,
            size.text_heads,
            hidden=size.text_hidden,
            causal=True,
            activation=size.activation,
            **options,
        )
        self.ln_final = nn.LayerNorm(width, eps=CLIP_NORM_EPS)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, size.embedding))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, input_ids_BL: Tensor, all_tokens: bool = False) -> Tensor:
        """Encode captions.

        Attention is causal, so padding after a caption's end has no effect. The end-of-text token is the one with the
        largest id of the vocabulary.

        Args:
            input_ids_BL: start of text, the caption's tokens, end of text, padding of smaller ids.
            all_tokens: return the projected output of every token.

        Returns:
            [B, E] at the end-of-text token, or [B, L, E]; not normalised.
        """
        length = input_ids_BL.shape[1]
        if length > self.context:
            raise ValueError(f"text: got {length} tokens; allowed: up to {self.context}")
        x, branch = self.transformer(self.token_embedding(input_ids_BL) + self.positional_embedding[:length])
        x = x + branch
        if not all_tokens:
            x = end_of_text(x, input_ids_BL)
        return F.linear(self.ln_final(x), self.text_projection.t())


def end_of_text(tokens_BLE: Tensor, input_ids_BL: Tensor) -> Tensor:
    """Return each caption's row at its end-of-text token, the first with the largest id: [B, L, E] -> [B, E]."""
    rows = torch.arange(len(tokens_BLE), device=tokens_BLE.device)
    return tokens_BLE[rows, input_ids_BL.argmax(dim=1)]


class Clip(ClipTextTower):
    """Both towers with OpenAI's parameter names: those of the text tower, `visual.*` and `logit_scale`.

    The module encodes captions; `visual` encodes frames.
    """

    def __init__(self, size: ClipSize, *, attention: str = "auto", **options: Any) -> None:
        """Build both towers with OpenAI's random initialisation.

        Args:
            size: sizes.
            attention: backend of frozen_kernels.divided_attention for the image tower.
            options: fused_ops and checkpointed_blocks of ClipTransformer, for both towers.
        """
        super().__init__(size, **options)
        self.size = size
        self.visual = ClipImageTower(size, attention=attention, **options)
        self.logit_scale = nn.Parameter(torch.tensor([FIRST_LOGIT_SCALE]))  # FSDP2 cannot shard scalars
