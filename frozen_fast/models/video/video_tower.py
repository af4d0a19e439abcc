"""The interface of video towers: an embedding per clip, and properties that training uses.

Axis letters: B batch, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from frozen_fast.config.schema import VideoTowerConfig
from frozen_fast.errors import UserError
from frozen_fast.models.counted_flops import counted_flops
from frozen_fast.models.repeated_blocks import find_repeated_blocks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ANY_NUMBER = sys.maxsize - 1
"""Value of max_frames for towers without parameters per frame."""


class VideoTower(nn.Module, ABC):
    """Clips -> one vector each.

    Attributes:
        name: its name in frozen_fast.config.extensions.video_towers, written to config.json.
        keys: the keys of model.video that it reads, in addition to tower, options and checkpointed_blocks. Setting
            another key is an error.
        described_by: keys that architecture() contains under the same names; with model.checkpoint they must agree with
            the checkpoint.
        frame_embeddings: names of parameters [1, max_frames, D] with one row per frame, which are expanded at a stage
            with more frames; empty: any number of frames needs no new parameters.
        width: D.
        resolution: pixels along a frame's edge.
        max_frames: most frames of a clip.
        mean, std: RGB normalisation, in [0, 1], of the training of the tower's published weights.
        usual_frames: default number of frames of a window in feature extraction.
        checkpointed_blocks: number of repeated_blocks() that recompute their activations in the backward pass.
        folds_normalisation: whether forward accepts uint8 pixels and a PixelNormalisation as second argument.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ("size", "weights")
    described_by: ClassVar[tuple[str, ...]] = ("size",)
    frame_embeddings: tuple[str, ...] = ()
    width: int
    resolution: int
    max_frames: int = ANY_NUMBER
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    usual_frames: ClassVar[int] = 1
    checkpointed_blocks: int = 0
    folds_normalisation: ClassVar[bool] = False

    # Building

    @classmethod
    @abstractmethod
    def from_config(cls, section: VideoTowerConfig, *, max_frames: int) -> Self:
        """Build a tower with the weights that a config names; random weights come from torch's global generator.

        Args:
            section: model.video.
            max_frames: most frames of any stage.

        Raises:
            UserError: naming the key under model.video.
        """

    @classmethod
    @abstractmethod
    def from_architecture(
        cls, data: Mapping[str, Any], *, max_frames: int, section: VideoTowerConfig | None = None
    ) -> Self:
        """Build the tower that architecture() describes, with undefined weights that are loaded afterwards.

        Args:
            data: the result of architecture().
            max_frames: rows of its frame embeddings.
            section: keys that do not describe the architecture (attention, checkpointed_blocks); None: defaults.
        """

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return data for from_architecture that JSON can represent, without the tower's name and max_frames."""

    @classmethod
    def frames_taken(cls, section: VideoTowerConfig, max_frames: int) -> range:
        """Return the numbers of frames that a tower of this config supports, without building the tower.

        Args:
            section: model.video.
            max_frames: most frames of any stage.

        Raises:
            UserError: naming the key under model.video that is wrong.
        """
        return range(1, max_frames + 1)

    @classmethod
    def check_agreement(cls, section: VideoTowerConfig, data: Mapping[str, Any]) -> None:
        """Refuse keys that contradict a checkpoint's architecture.

        Args:
            section: model.video, with None for keys that are not set.
            data: the result of architecture() of the checkpoint's tower.

        Raises:
            UserError: naming the key, the value and the checkpoint's.
        """
        for key in cls.described_by:
            said = getattr(section, key)
            if said is not None and key in data and said != data[key]:
                raise UserError(f"model.video.{key}: got {said!r}; allowed: {data[key]!r}, that of model.checkpoint")
        told = data.get("options") or {}
        for key, said in section.options:
            if key in told and said != told[key]:
                allowed = f"{told[key]!r}, that of model.checkpoint"
                raise UserError(f"model.video.options.{key}: got {said!r}; allowed: {allowed}")

    # Computing

    @abstractmethod
    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips.

        Args:
            video_BTCHW: [B, T, 3, resolution, resolution], normalised floats, T in `frames`.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape.
        """

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a completely frozen tower stays in eval mode, so that running averages do not change."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    @property
    def frames(self) -> range:
        """The supported numbers of frames of a clip."""
        return range(1, self.max_frames + 1)

    def check_video(self, video_BTCHW: Tensor) -> None:
        """Raise a ValueError that names the expected shape if the clip batch has another one."""
        side = self.resolution
        shape = tuple(video_BTCHW.shape)
        if len(shape) != 5 or shape[0] < 1 or shape[2:] != (3, side, side) or shape[1] not in self.frames:
            expected = f"[B, T, 3, {side}, {side}] with {frames_in_words(self.frames, 'T')}"
            raise ValueError(f"video: got shape {list(shape)}; allowed: {expected}")

    # Kernels

    def check_kernels(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Raise a UserError if a kernel that the config selects cannot run on a device in a dtype."""

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Choose kernels by measurement for the shapes of a stage, because torch.compile does not allow it later.

        Args:
            batch_sizes: frames -> clips of one forward pass on this rank.
            device: device of the tower.
            dtype: dtype of the matrix products.
        """

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Return entries of environment.json on the kernels that have run, for the report."""
        return {}

    # For training

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks that make up most of the tower, the units of compilation, recomputation and sharding."""
        return find_repeated_blocks(self)

    def forward_flops(self, frames: int, *, executed: bool = True) -> float | None:
        """Return the forward FLOPs of one clip (a multiply-add counts as 2); None if unknown.

        Args:
            frames: T.
            executed: count what this implementation computes; False: the published model.
        """
        return counted_flops(self._bare_copy, (1, frames, 3, self.resolution, self.resolution))

    def pixel_flops(self, frames: int) -> float:
        """Return the share of forward_flops whose input is pixels, which need no gradient; 0 if unknown."""
        return 0.0

    def _bare_copy(self) -> nn.Module:
        return type(self).from_architecture(self.architecture(), max_frames=min(self.max_frames, 2**16))


def frames_in_words(frames: range, symbol: str = "") -> str:
    """Format a range of frames for a message: "1 to 8", "exactly 16", "14 or more"; or bounds on a symbol."""
    first, last = frames[0], frames[-1]
    if last >= ANY_NUMBER:
        return f"{symbol} >= {first}" if symbol else f"{first} or more"
    if first == last:
        return f"{symbol} = {first}" if symbol else f"exactly {first}"
    return f"{first} <= {symbol} <= {last}" if symbol else f"{first} to {last}"


def check_frames(tower: type[VideoTower], section: VideoTowerConfig, frames: Sequence[tuple[str, int]]) -> None:
    """Refuse numbers of frames that a tower does not support, before it is built.

    Args:
        tower: the class.
        section: model.video.
        frames: (config key, number of frames) pairs.

    Raises:
        UserError: naming the first wrong key.
    """
    taken = tower.frames_taken(section, max(number for _, number in frames))
    for key, number in frames:
        if number not in taken:
            what = f"{tower.name} {section.size}" if section.size else tower.name
            raise UserError(f"{key}: got {number}; allowed: {frames_in_words(taken)}, which {what} supports")
