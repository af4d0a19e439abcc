"""A video tower from outside the tree: three convolutions per frame, averaged over frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.models.video.video_tower import VideoTower


class ConvTower(VideoTower):
    """Convolutions on every frame and the mean over positions and frames; takes any number of frames."""

    name = "conv"
    keys = ()  # of model.video it reads options only
    described_by = ()
    resolution = 32

    def __init__(self, width: int) -> None:
        """Random weights; width: D."""
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(width // 4, width, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(width, width, 2, stride=2),
        )

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> Self:
        """model.video.options.width, 64 by default."""
        return cls(int(dict(section.options).get("width", 64)))

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> Self:
        """See VideoTower."""
        return cls(data["width"])

    def architecture(self) -> dict[str, Any]:
        """See VideoTower."""
        return {"width": self.width}

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """See VideoTower."""
        self.check_video(video_BTCHW)
        frames = self.layers(video_BTCHW.flatten(0, 1)).mean((2, 3))
        return frames.unflatten(0, video_BTCHW.shape[:2]).mean(1)
