"""Video tower: torchvision's networks over space and time, by name and without their classifiers.

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
    """What a torchvision video network takes.

    Attributes:
        head: name of its classifier.
        frames: the numbers of frames that a clip may have.
        resolution: pixels along a frame's edge that its pretrained weights were made for.
        fixed_resolution: it takes no other.
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
"""model.video.size -> what the network takes."""


class TorchvisionVideo(VideoTower):
    """S3D, R3D, R(2+1)D, MC3, MViT or Video Swin of torchvision, and the 3D ResNet of 101 layers from its parts.

    S3D (from 8 frames on), the ResNets and Swin have no weights per frame and take clips of any length. MViT's
    positions are for 16 frames: it cannot grow from stage to stage. S3D's last average is taken over the whole feature
    map, so that a clip may be shorter and smaller than 16 frames of 224 x 224, where it equals torchvision's.
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
            resolution: pixels along a frame's edge; None: what the pretrained weights were made for.
            checkpointed_blocks: number of blocks that recompute their activations.
            pretrained: torchvision's weights (Kinetics-400), from its cache or a download; False: random ones.

        Raises:
            UserError: for an unknown name, or weights that cannot be had.
        """
        super().__init__()
        network = named_network(size)
        self.size, self.network = size, network
        self.resolution = resolution or network.resolution
        self.max_frames = network.frames[-1]
        try:
            self.model = _network(size, pretrained)
        except Exception as error:  # a download raises many kinds
            raise UserError(f"model.video.size: got {size!r}, which cannot be had ({reason(error)})") from error
        if size == "s3d":
            self.model.avgpool = nn.AdaptiveAvgPool3d(1)
        self.width = _take_off_the_head(self.model, network.head)
        self.mean, self.std = _normalisation(size)
        self.checkpointed_blocks = checkpointed_blocks
        recompute_blocks(self.repeated_blocks(), checkpointed_blocks)

    @classmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> TorchvisionVideo:
        """The tower of a config's model.video."""
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
        """The tower that architecture() describes, with random weights."""
        return cls(
            data["size"],
            resolution=data["resolution"],
            checkpointed_blocks=0 if section is None else section.checkpointed_blocks,
        )

    def architecture(self) -> dict[str, Any]:
        """The network's name and its resolution."""
        return {"size": self.size, "resolution": self.resolution}

    @property
    def frames(self) -> range:
        """The numbers of frames that a clip may have."""
        return self.network.frames

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """As the tower's `frames`; name and resolution are checked too."""
        network = named_network(section.size)
        if network.fixed_resolution and section.resolution not in (None, network.resolution):
            allowed = f"{network.resolution} with {section.size}"
            raise UserError(f"model.video.resolution: got {section.resolution}; allowed: {allowed}")
        return network.frames

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: [B, T, 3, resolution, resolution] -> [B, D], the input of the network's classifier."""
        self.check_video(video_BTCHW)
        return self.model(video_BTCHW.transpose(1, 2)).flatten(1)


def named_network(size: str | None) -> Network:
    """What the network of a name takes.

    Raises:
        UserError: naming model.video.size.
    """
    if size not in NETWORKS:
        raise unknown_name("model.video.size", str(size), NETWORKS)
    return NETWORKS[size]


def _network(size: str, pretrained: bool) -> nn.Module:
    """The network with its classifier."""
    if size != "r3d_101":
        return get_model(size, weights=get_model_weights(size).DEFAULT if pretrained else None)
    if pretrained:
        raise ValueError("torchvision has no weights for it; allowed: none, or a local file")
    # torchvision has its parts only: the 3D ResNet of 101 layers, 3 + 4 + 23 + 3 bottlenecks.
    return VideoResNet(Bottleneck, [Conv3DSimple] * 4, [3, 4, 23, 3], BasicStem)


def _normalisation(size: str) -> tuple[Any, Any]:
    """Mean and standard deviation of the pixels that torchvision's weights were trained with."""
    preset = get_model_weights("r3d_18" if size == "r3d_101" else size).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def _take_off_the_head(model: nn.Module, name: str) -> int:
    """Replace the classifier by nothing; returns the width of what it took."""
    head = getattr(model, name)
    layers = [layer for layer in head.modules() if isinstance(layer, (nn.Linear, nn.Conv3d))]
    setattr(model, name, nn.Identity())
    first = layers[0]
    return int(first.in_features if isinstance(first, nn.Linear) else first.in_channels)
