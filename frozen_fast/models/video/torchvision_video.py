"""Video tower: torchvision's video networks by name, without their classifiers.

Axis letters: B batch, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.video.resnet import BasicStem, Bottleneck, Conv3DSimple, VideoResNet

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.errors import UserError, reason, unknown_name
from frozen_fast.models.repeated_blocks import recompute_blocks
from frozen_fast.models.video.video_tower import ANY_NUMBER, VideoTower
from frozen_fast.models.video.weight_files import load_weight_file

PRETRAINED = "pretrained"
FORMS = "none, pretrained, or a local file of this torchvision model's weights"


@dataclass(frozen=True, kw_only=True)
class Network:
    """Properties of a torchvision video network.

    Attributes:
        head: name of its classifier.
        frames: the supported numbers of frames of a clip.
        resolution: pixels along a frame's edge in the training of its pretrained weights.
        fixed_resolution: whether it supports no other resolution.
    """

    head: str
    frames: range = range(1, ANY_NUMBER + 1)
    resolution: int = 112
    fixed_resolution: bool = False


_RESNET = Network(head="fc")
_MVIT = Network(head="head", frames=range(16, 17), resolution=224, fixed_resolution=True)
_SWIN = Network(head="head", resolution=224)

NETWORKS: dict[str, Network] = {
    "s3d": Network(head="classifier", frames=range(8, ANY_NUMBER + 1), resolution=224),
    "r3d_18": _RESNET,
    "r3d_101": _RESNET,
    "r2plus1d_18": _RESNET,
    "mc3_18": _RESNET,
    "mvit_v1_b": _MVIT,
    "mvit_v2_s": _MVIT,
    "swin3d_t": _SWIN,
    "swin3d_s": _SWIN,
    "swin3d_b": _SWIN,
}
"""model.video.size -> properties of the network."""


class TorchvisionVideo(VideoTower):
    """S3D, R3D, R(2+1)D, MC3, MViT or Video Swin of torchvision, and the 3D ResNet of 101 layers from its parts.

    S3D (with at least 8 frames), the ResNets and Swin have no weights per frame and accept clips of any length. MViT
    has positions for 16 frames, so its number of frames cannot change between stages. S3D's last average covers the
    whole feature map, so that clips may be shorter and smaller than 16 frames of 224 x 224; for this size it equals
    torchvision's.
    """

    name = "torchvision_video"
    keys = ("size", "weights", "resolution")
    described_by = ("size", "resolution")
    usual_frames = 16

    def __init__(
        self,
        size: str,
        *,
        resolution: int | None = None,
        checkpointed_blocks: int = 0,
        pretrained: bool = False,
    ) -> None:
        """Build the tower.

        Args:
            size: a name of NETWORKS.
            resolution: pixels along a frame's edge; None: that of the pretrained weights.
            checkpointed_blocks: number of blocks that recompute their activations.
            pretrained: load torchvision's weights (Kinetics-400) from its cache or by download; False: random weights.

        Raises:
            UserError: the name is unknown, or the weights cannot be loaded.
        """
        super().__init__()
        network = named_network(size)
        self.size, self.network = size, network
        self.resolution = resolution or network.resolution
        self.max_frames = network.frames[-1]
        try:
            self.model = _network(size, pretrained)
        except Exception as error:  # a download raises many types
            raise UserError(f"model.video.size: got {size!r}, which cannot be loaded ({reason(error)})") from error
        if size == "s3d":
            self.model.avgpool = nn.AdaptiveAvgPool3d(1)
        self.width = _take_off_the_head(self.model, network.head)
        self.mean, self.std = _normalisation(size)
        self.checkpointed_blocks = checkpointed_blocks
        recompute_blocks(self.repeated_blocks(), checkpointed_blocks)

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> TorchvisionVideo:
        """Build the tower of a config's model.video."""
        tower = cls(
            str(section.size),
            resolution=section.resolution,
            checkpointed_blocks=section.checkpointed_blocks,
            pretrained=section.weights == PRETRAINED,
        )
        if section.weights not in ("none", PRETRAINED):
            head = f"{tower.network.head}."
            load_weight_file(tower.model, section.weights, FORMS, lambda name: name.startswith(head))
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> TorchvisionVideo:
        """Build the tower that architecture() describes, with random weights."""
        return cls(
            data["size"],
            resolution=data["resolution"],
            checkpointed_blocks=0 if section is None else section.checkpointed_blocks,
        )

    def architecture(self) -> dict[str, Any]:
        """Return the network's name and its resolution."""
        return {"size": self.size, "resolution": self.resolution}

    @property
    def frames(self) -> range:
        """The supported numbers of frames of a clip."""
        return self.network.frames

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """Return the numbers of frames that the network supports, after checking name and resolution."""
        network = named_network(section.size)
        if network.fixed_resolution and section.resolution not in (None, network.resolution):
            allowed = f"{network.resolution} with {section.size}"
            raise UserError(f"model.video.resolution: got {section.resolution}; allowed: {allowed}")
        return network.frames

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, D], the input of the removed classifier."""
        self.check_video(video_BTCHW)
        return self.model(video_BTCHW.transpose(1, 2)).flatten(1)


def named_network(size: str | None) -> Network:
    """Return the properties of a network.

    Raises:
        UserError: naming model.video.size.
    """
    if size not in NETWORKS:
        raise unknown_name("model.video.size", str(size), NETWORKS)
    return NETWORKS[size]


def _network(size: str, pretrained: bool) -> nn.Module:
    """Build the network with its classifier."""
    if size != "r3d_101":
        return get_model(size, weights=get_model_weights(size).DEFAULT if pretrained else None)
    if pretrained:
        raise ValueError("torchvision has no weights for it; allowed: none, or a local file")
    # torchvision has only the parts of the 3D ResNet of 101 layers (3 + 4 + 23 + 3 bottlenecks).
    return VideoResNet(Bottleneck, [Conv3DSimple] * 4, [3, 4, 23, 3], BasicStem)


def _normalisation(size: str) -> tuple[Any, Any]:
    """Return mean and standard deviation of the pixels in the training of torchvision's weights."""
    preset = get_model_weights("r3d_18" if size == "r3d_101" else size).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def _take_off_the_head(model: nn.Module, name: str) -> int:
    """Remove the classifier; return the width of its input."""
    head = getattr(model, name)
    layers = [layer for layer in head.modules() if isinstance(layer, (nn.Linear, nn.Conv3d))]
    setattr(model, name, nn.Identity())
    first = layers[0]
    return int(first.in_features if isinstance(first, nn.Linear) else first.in_channels)
