"""Video tower: any timm image model on each frame, then the mean over frames or a small transformer over time.

Axis letters: B batch, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.errors import UserError, reason
from frozen_fast.models.repeated_blocks import recompute_blocks
from frozen_fast.models.video.video_tower import ANY_NUMBER, VideoTower
from frozen_fast.models.video.weight_files import load_weight_file

OverTime = Literal["mean", "transformer"]

PRETRAINED = "pretrained"
HEAD_WIDTH = 64
FEED_FORWARD_RATIO = 4


class TimmFrames(VideoTower):
    """A timm image model without its classifier, run on each frame.

    With over_time "mean", the number and the order of the frames have no effect on the architecture. With
    "transformer", learned position embeddings are added to the frames' features, and self-attention layers run over the
    T frames. The output projections of these layers are initialised to 0, so that the tower initially computes the
    mean.
    """

    name = "timm"
    keys = ("size", "weights", "resolution", "over_time", "time_layers", "temporal_init_std")
    described_by = ("size", "resolution", "over_time", "time_layers")

    def __init__(
        self,
        size: str,
        *,
        resolution: int | None = None,
        over_time: OverTime = "mean",
        time_layers: int = 2,
        max_frames: int = ANY_NUMBER,
        checkpointed_blocks: int = 0,
        temporal_init_std: float = 0.0,
        pretrained: bool = False,
    ) -> None:
        """Build the tower.

        Args:
            size: name of a timm model.
            resolution: pixels along a frame's edge; None: the model's default.
            over_time: how the frames' features are combined.
            time_layers: number of layers of the transformer over time.
            max_frames: rows of the frame positions (over_time "transformer").
            checkpointed_blocks: number of the image model's blocks that recompute their activations.
            temporal_init_std: standard deviation of the initial frame positions.
            pretrained: load timm's weights from its cache or by download; False: random weights.

        Raises:
            UserError: the name is unknown to timm, the weights cannot be loaded, or the resolution is not supported.
        """
        super().__init__()
        check_name(size)
        self.size, self.over_time, self.time_layers = size, over_time, time_layers
        self.image_model = _image_model(size, resolution, pretrained)
        self.resolution = resolution or int(self.image_model.pretrained_cfg["input_size"][-1])
        self.width = int(getattr(self.image_model, "head_hidden_size", self.image_model.num_features))
        self.mean, self.std = (tuple(self.image_model.pretrained_cfg[key]) for key in ("mean", "std"))
        if over_time == "transformer":
            self.max_frames = max_frames
            self.frame_embeddings = ("temporal_embed",)
            self.temporal_embed = nn.Parameter(torch.zeros(1, max_frames, self.width))
            nn.init.normal_(self.temporal_embed, std=temporal_init_std)
            self.time_blocks = nn.ModuleList(_time_block(self.width) for _ in range(time_layers))
        self.checkpointed_blocks = checkpointed_blocks
        recompute_blocks(self.repeated_blocks(), checkpointed_blocks)

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> TimmFrames:
        """Build the tower of a config's model.video."""
        tower = cls(
            str(section.size),
            resolution=section.resolution,
            over_time=section.over_time or "mean",
            time_layers=section.time_layers or 2,
            max_frames=max_frames,
            checkpointed_blocks=section.checkpointed_blocks,
            temporal_init_std=section.temporal_init_std,
            pretrained=section.weights == PRETRAINED,
        )
        if section.weights not in ("none", PRETRAINED):
            load_weight_file(tower.image_model, section.weights, FORMS, tower.is_head)
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> TimmFrames:
        """Build the tower that architecture() describes, with random weights."""
        return cls(
            data["size"],
            resolution=data["resolution"],
            over_time=data["over_time"],
            time_layers=data["time_layers"] or 0,
            max_frames=max_frames,
            checkpointed_blocks=0 if section is None else section.checkpointed_blocks,
        )

    def architecture(self) -> dict[str, Any]:
        """Return the image model's name, its resolution, and the settings over time."""
        layers = self.time_layers if self.over_time == "transformer" else None
        keys = {"size": self.size, "resolution": self.resolution, "over_time": self.over_time}
        return {**keys, "time_layers": layers}

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """Return 1 to max_frames, after checking the name and the settings over time."""
        check_name(section.size)
        if section.time_layers is not None and section.over_time != "transformer":
            over = section.over_time or "mean"
            raise UserError(
                f"model.video.time_layers: got {section.time_layers} with over_time {over!r}; allowed: null, or "
                "over_time transformer"
            )
        return super().frames_taken(section, max_frames)

    def is_head(self, name: str) -> bool:
        """Return whether a weight of a timm file belongs to the classifier, which this tower does not have."""
        classifiers = self.image_model.pretrained_cfg.get("classifier") or ()
        prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        return name not in self.image_model.state_dict() and name.startswith(tuple(f"{one}." for one in prefixes))

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, D], the mean over frames of their features."""
        self.check_video(video_BTCHW)
        batch, frames = video_BTCHW.shape[:2]
        features_BTD = self.image_model(video_BTCHW.flatten(0, 1)).unflatten(0, (batch, frames))
        if self.over_time == "transformer":
            features_BTD = features_BTD + self.temporal_embed[:, :frames]
            for block in self.time_blocks:
                features_BTD = block(features_BTD)
        return features_BTD.mean(1)


FORMS = "none, pretrained, or a local file of this timm model's weights"


def check_name(size: str | None) -> None:
    """Refuse a name that is not that of a timm model.

    Raises:
        UserError: naming model.video.size.
    """
    if size is None:
        raise UserError("model.video.size: got none; allowed with the tower timm: a timm model, such as resnet101")
    if not timm.is_model(size):
        near = get_close_matches(size.split(".")[0], timm.list_models(), n=3) or ["resnet101", "vit_base_patch16_224"]
        raise UserError(f"model.video.size: got {size!r}; allowed: a timm model such as {', '.join(near)}")


def _image_model(size: str, resolution: int | None, pretrained: bool) -> Any:
    """Build the model without a classifier: pooled features per image."""
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        model: Any = timm.create_model(size, **options)
        if resolution is not None and resolution != model.pretrained_cfg["input_size"][-1] and _has_fixed_size(model):
            model = timm.create_model(size, **options, img_size=resolution)
    except Exception as error:  # timm and its download raise many types
        what = f"weights {PRETRAINED!r}" if pretrained else f"resolution {resolution}"
        raise UserError(
            f"model.video.size: got {size!r} with {what}, which cannot be loaded ({reason(error)})"
        ) from error
    return model


def _has_fixed_size(model: nn.Module) -> bool:
    """Return whether a model supports one image size only (transformers do, convolutional networks do not)."""
    return hasattr(model, "patch_embed") or hasattr(model, "set_input_size")


def _time_block(width: int) -> nn.Module:
    """A pre-norm transformer layer over [B, T, D], initialised as the identity."""
    heads = max(1, width // HEAD_WIDTH)
    while width % heads:
        heads -= 1
    layer = nn.TransformerEncoderLayer(
        width, heads, FEED_FORWARD_RATIO * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    for projection in (layer.self_attn.out_proj, layer.linear2):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    return layer
