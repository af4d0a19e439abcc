"""Video tower: CLIP's image tower on each frame, then the mean of the normalised frame embeddings (CLIP4Clip).

Axis letters: B clips, T frames, E width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.clip_blocks import HEAD_WIDTH, ClipBlock, ClipTransformer
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_SIZES, CLIP_STD, ClipImageTower, ClipSize
from frozen_fast.models.clip.clip_weights import read_clip
from frozen_fast.models.video.video_tower import ANY_NUMBER, VideoTower

OverTime = Literal["mean", "transformer"]
TIME_LAYERS = 4


class ClipFrames(VideoTower):
    """CLIP4Clip's video side: meanP (over_time "mean") or seqTransf ("transformer").

    The transformer adds to the frame embeddings what its blocks add to the embeddings with frame positions. Its output
    projections start at 0, so that it starts as the identity.
    """

    name = "clip"
    mean, std = CLIP_MEAN, CLIP_STD
    keys = ("size", "weights", "over_time", "time_layers", "attention", "fused_ops", "temporal_init_std")
    described_by = ("over_time", "time_layers")

    def __init__(
        self,
        size: ClipSize,
        *,
        over_time: OverTime = "mean",
        time_layers: int = TIME_LAYERS,
        max_frames: int = ANY_NUMBER,
        temporal_init_std: float = 0.0,
        **options: Any,
    ) -> None:
        """Build the tower with random weights.

        Args:
            size: of CLIP.
            over_time: how the frame embeddings become one.
            time_layers: of the transformer.
            max_frames: rows of the frame positions (over_time "transformer").
            temporal_init_std: spread of the frame positions' start.
            options: attention, fused_ops, checkpointed_blocks of ClipImageTower.
        """
        super().__init__()
        self.size, self.over_time, self.time_layers = size, over_time, time_layers
        self.visual = ClipImageTower(size, **options)
        self.resolution, self.width = size.resolution, size.embedding
        self.checkpointed_blocks = int(options.get("checkpointed_blocks", 0))
        if over_time == "transformer":
            self.max_frames = max_frames
            self.frame_embeddings = ("temporal_embed",)
            self.temporal_embed = nn.Parameter(temporal_init_std * torch.randn(1, max_frames, self.width))
            heads = max(1, self.width // HEAD_WIDTH)
            self.over_frames = ClipTransformer(self.width, time_layers, heads, activation=size.activation)
            for module in self.over_frames.resblocks:
                block = cast(ClipBlock, module)
                nn.init.zeros_(block.attn.out_proj.weight)
                nn.init.zeros_(block.mlp.c_proj.weight)

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> ClipFrames:
        """The tower of a config's model.video; weights: none, or what clip_weights.read_clip takes."""
        weights = None if section.weights == "none" else read_clip(section.weights)
        if weights is None and section.size not in CLIP_SIZES:
            raise unknown_name("model.video.size", str(section.size), CLIP_SIZES)
        size = CLIP_SIZES[str(section.size)] if weights is None else weights.size
        if weights is not None and section.size is not None and CLIP_SIZES.get(section.size) != size:
            raise UserError(f"model.video.size: got {section.size!r}; allowed: null, {section.weights} says it")
        tower = cls(
            size,
            over_time=section.over_time or "mean",
            time_layers=section.time_layers or TIME_LAYERS,
            max_frames=max_frames,
            temporal_init_std=section.temporal_init_std,
            **_how(section),
        )
        if weights is not None:
            state = {name: value for name, value in weights.state.items() if name.startswith("visual.")}
            tower.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> ClipFrames:
        """The tower that architecture() describes, with random weights."""
        return cls(
            ClipSize(**data["clip"]),
            over_time=data["over_time"],
            time_layers=data["time_layers"],
            max_frames=max_frames,
            **({} if section is None else _how(section)),
        )

    def architecture(self) -> dict[str, Any]:
        """CLIP's sizes, and what comes after it."""
        return {"clip": asdict(self.size), "over_time": self.over_time, "time_layers": self.time_layers}

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, E], the mean of normalised frame embeddings."""
        self.check_video(video_BTCHW)
        frames_BTE = self.visual(video_BTCHW).float()
        if self.over_time == "transformer":
            placed = frames_BTE + self.temporal_embed[:, : frames_BTE.shape[1]]
            x, branch = self.over_frames(placed)
            frames_BTE = frames_BTE + (x + branch - placed).float()
        return F.normalize(frames_BTE, dim=-1).mean(dim=1)


def _how(section: VideoTowerConfig) -> dict[str, Any]:
    """Keys that say how the tower computes, not what it is."""
    return {
        "attention": section.attention,
        "fused_ops": section.fused_ops,
        "checkpointed_blocks": section.checkpointed_blocks,
    }
