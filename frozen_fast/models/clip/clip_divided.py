"""Video tower: CLIP's ViT as the space part of the space-time transformer, with time attention initialised to 0.

Axis letters: see frozen_fast.models.video.space_time; E width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.clip_blocks import CLIP_NORM_EPS, GELU_FORMS
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_SIZES, CLIP_STD, ClipSize
from frozen_fast.models.clip.clip_weights import read_clip
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.video.blocks import SpaceTimeBlock
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.video_tower import VideoTower

_BLOCK_NAMES = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    **{f"attn.out_proj.{kind}": f"attn.proj.{kind}" for kind in ("weight", "bias")},
    **{f"ln_1.{kind}": f"norm1.{kind}" for kind in ("weight", "bias")},
    **{f"ln_2.{kind}": f"norm2.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.c_fc.{kind}": f"mlp.fc1.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.c_proj.{kind}": f"mlp.fc2.{kind}" for kind in ("weight", "bias")},
}


class ClipDivided(SpaceTimeTransformer):
    """Divided space-time attention with CLIP's weights; at one frame it equals CLIP's image tower.

    As in CLIP, it differs from the space-time transformer by patches without bias, a LayerNorm before the blocks,
    epsilon 1e-5, QuickGELU, and a projection to the common space.
    """

    name = "clip_divided"
    mean, std = CLIP_MEAN, CLIP_STD
    keys: ClassVar[tuple[str, ...]] = (
        "size",
        "weights",
        "attention",
        "fused_ops",
        "temporal_init_std",
        "full_last_block",
    )
    described_by: ClassVar[tuple[str, ...]] = ()

    def __init__(self, clip: ClipSize, max_frames: int, **options: Any) -> None:
        """Build the tower with random weights.

        Args:
            clip: CLIP's sizes.
            max_frames: rows of temporal_embed.
            options: keyword arguments of SpaceTimeTransformer.
        """
        size = VideoSize(
            resolution=clip.resolution,
            patch=clip.patch,
            width=clip.image_width,
            depth=clip.image_depth,
            heads=clip.image_heads,
            mlp_ratio=clip.image_hidden // clip.image_width,
        )
        super().__init__(size, max_frames, **options)
        self.clip = clip
        self.width = clip.embedding
        self.patch_embed.proj.register_parameter("bias", None)
        self.norm_pre = nn.LayerNorm(size.width, eps=CLIP_NORM_EPS)
        self.proj = nn.Parameter(size.width**-0.5 * torch.randn(size.width, clip.embedding))
        self.norm.eps = CLIP_NORM_EPS
        for module in self.blocks:
            block = cast(SpaceTimeBlock, module)
            for norm in (block.norm1, block.norm2, block.norm3):
                norm.eps = CLIP_NORM_EPS
            block.mlp.fc1.approximate = GELU_FORMS[clip.activation]

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> ClipDivided:
        """Build the tower of a config's model.video; weights is none, or a source for clip_weights.read_clip."""
        weights = None if section.weights == "none" else read_clip(section.weights)
        if weights is None and section.size not in CLIP_SIZES:
            raise unknown_name("model.video.size", str(section.size), CLIP_SIZES)
        if weights is not None and section.size is not None and CLIP_SIZES.get(section.size) != weights.size:
            raise UserError(f"model.video.size: got {section.size!r}; allowed: null, {section.weights} says it")
        clip = CLIP_SIZES[str(section.size)] if weights is None else weights.size
        tower = cls(clip, max_frames, temporal_init_std=section.temporal_init_std, **_how(section))
        if weights is not None:
            tower.load_clip(weights.state)
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> ClipDivided:
        """Build the tower that architecture() describes, with random weights."""
        return cls(ClipSize(**data["clip"]), max_frames, **({} if section is None else _how(section)))

    def architecture(self) -> dict[str, Any]:
        """Return CLIP's sizes."""
        return {"clip": asdict(self.clip)}

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """Return 1 to max_frames."""
        return range(1, max_frames + 1)

    @classmethod
    def check_agreement(cls, section: VideoTowerConfig, data: Mapping[str, Any]) -> None:
        """Do nothing: the architecture consists of the sizes, which model.checkpoint gives."""
        VideoTower.check_agreement.__func__(cls, section, data)  # type: ignore[attr-defined]

    def load_clip(self, state: Mapping[str, Tensor]) -> None:
        """Load the image tower's weights of CLIP by OpenAI's names; time attention and temporal_embed do not change."""
        own = {
            "patch_embed.proj.weight": state["visual.conv1.weight"],
            "cls_token": state["visual.class_embedding"][None, None],
            "pos_embed": state["visual.positional_embedding"][None],
            "proj": state["visual.proj"],
        }
        for kind in ("weight", "bias"):
            own[f"norm_pre.{kind}"] = state[f"visual.ln_pre.{kind}"]
            own[f"norm.{kind}"] = state[f"visual.ln_post.{kind}"]
        for layer in range(self.size.depth):
            for theirs, ours in _BLOCK_NAMES.items():
                own[f"blocks.{layer}.{ours}"] = state[f"visual.transformer.resblocks.{layer}.{theirs}"]
        missing, unknown = self.load_state_dict(own, strict=False)
        stay = ("temporal_embed", ".timeattn.", ".norm3.")
        assert not unknown and all(any(part in name for part in stay) for name in missing), (missing, unknown)

    def embed_tokens(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """Return tokens with position embeddings after CLIP's LayerNorm before the blocks: [B, S, D]."""
        return self.norm_pre(super().embed_tokens(video_BTCHW, normalisation))

    def forward(self, video_BTCHW: Tensor, normalisation: PixelNormalisation | None = None) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, E]; see SpaceTimeTransformer."""
        return F.linear(super().forward(video_BTCHW, normalisation), self.proj.t())


def _how(section: VideoTowerConfig) -> dict[str, Any]:
    """Keys that select how the tower computes, not its architecture."""
    return {key: getattr(section, key) for key in ("attention", "fused_ops", "checkpointed_blocks", "full_last_block")}
