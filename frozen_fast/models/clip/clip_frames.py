"""Video tower: CLIP's image tower on each frame, then the mean of the normalised frame embeddings (CLIP4Clip).

Axis letters: B clips, T frames, E width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.clip_blocks import HEAD_WIDTH, ClipBlock, ClipTransformer, settle_sequences
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_SIZES, CLIP_STD, ClipImageTower, ClipSize
from frozen_fast.models.clip.clip_weights import read_clip
from frozen_fast.models.video.kernel_choice import AUTO_ATTENTION, kernels_of
from frozen_fast.models.video.video_tower import ANY_NUMBER, VideoTower

OverTime = Literal["mean", "transformer"]
TIME_LAYERS = 4


class ClipFrames(VideoTower):
    """CLIP4Clip's video side: meanP (over_time "mean") or seqTransf ("transformer").

    The transformer's blocks run on frame embeddings with position embeddings, and what they add is added to the frame
    embeddings. Their output projections are initialised to 0, so that the transformer is initially the identity. The
    image tower is a class attribute, which siglip_frames overrides.
    """

    name = "clip"
    mean, std = CLIP_MEAN, CLIP_STD
    sizes: ClassVar[Mapping[str, Any]] = CLIP_SIZES
    size_class: ClassVar[type[Any]] = ClipSize
    image_tower: ClassVar[type[Any]] = ClipImageTower
    keys = ("size", "weights", "over_time", "time_layers", "attention", "fused_ops", "temporal_init_std")
    described_by = ("over_time", "time_layers")

    def __init__(
        self,
        size: Any,
        *,
        over_time: OverTime = "mean",
        time_layers: int = TIME_LAYERS,
        max_frames: int = ANY_NUMBER,
        temporal_init_std: float = 0.0,
        **options: Any,
    ) -> None:
        """Build the tower with random weights.

        Args:
            size: sizes of the image model, a size_class.
            over_time: how the frame embeddings are combined.
            time_layers: number of layers of the transformer.
            max_frames: rows of the frame positions (over_time "transformer").
            temporal_init_std: standard deviation of the initial frame positions.
            options: attention, fused_ops and checkpointed_blocks of the image tower.
        """
        super().__init__()
        self.size, self.over_time, self.time_layers = size, over_time, time_layers
        self.visual = self.image_tower(size, **options)
        self.resolution, self.width = size.resolution, size.embedding
        self.checkpointed_blocks = int(options.get("checkpointed_blocks", 0))
        self.attention = str(options.get("attention", AUTO_ATTENTION))
        self.fused_ops = str(options.get("fused_ops", "auto"))
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

    @staticmethod
    def read(source: str) -> Any:
        """Read the image model's weights: `state`, with the image tower's under `visual.`, and its `size`."""
        return read_clip(source)

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> ClipFrames:
        """Build the tower of a config's model.video; weights is none, or a source for `read`."""
        weights = None if section.weights == "none" else cls.read(section.weights)
        if weights is None and section.size not in cls.sizes:
            raise unknown_name("model.video.size", str(section.size), cls.sizes)
        size = cls.sizes[str(section.size)] if weights is None else weights.size
        if weights is not None and section.size is not None and cls.sizes.get(section.size) != size:
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
        """Build the tower that architecture() describes, with random weights."""
        return cls(
            cls.size_class(**data[cls.name]),
            over_time=data["over_time"],
            time_layers=data["time_layers"],
            max_frames=max_frames,
            **({} if section is None else _how(section)),
        )

    def architecture(self) -> dict[str, Any]:
        """Return the image model's sizes, and the settings over time."""
        return {self.name: asdict(self.size), "over_time": self.over_time, "time_layers": self.time_layers}

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, E], the mean of normalised frame embeddings."""
        self.check_video(video_BTCHW)
        frames_BTE = self.visual(video_BTCHW).float()
        if self.over_time == "transformer":
            placed = frames_BTE + self.temporal_embed[:, : frames_BTE.shape[1]]
            x, branch = self.over_frames(placed)
            frames_BTE = frames_BTE + (x + branch - placed).float()
        return F.normalize(frames_BTE, dim=-1).mean(dim=1)

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Let "auto" choose attention for a stage's shapes, and import the chosen backends."""
        for frames, batch in batch_sizes.items():
            settle_sequences(self.visual, batch * frames, self.visual.tokens, device, dtype)
            if self.over_time == "transformer":
                settle_sequences(self.over_frames, batch, frames, device, dtype)

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Return the attention backends chosen so far, and the form of the fused ops."""
        return kernels_of(self.attention, self.fused_ops, device, compiled=compiled)


def _how(section: VideoTowerConfig) -> dict[str, Any]:
    """Keys that select how the tower computes, not its architecture."""
    return {
        "attention": section.attention,
        "fused_ops": section.fused_ops,
        "checkpointed_blocks": section.checkpointed_blocks,
    }
