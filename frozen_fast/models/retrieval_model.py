"""What every model of this project offers: features of captions and of clips, and their similarity.

A model encodes each side on its own into features (a dict of tensors whose first axis is the caption or the clip), and
compares two sets of features. Training, evaluation and search only use this interface: for a dual encoder the features
are one embedding and the similarity is a dot product; other models keep several tensors per clip and compare them in
another way.

Axis letters: Q captions, V clips, K similarities of a pair (one loss each), D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frozen_fast.config.extensions import model_methods
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError
from frozen_fast.models.learned_scale import LearnedScale
from frozen_fast.models.repeated_blocks import find_repeated_blocks

Features = Mapping[str, Tensor]
"""Name -> tensor; the first axis of every tensor is the caption or the clip."""

TextInput = Sequence[str] | Mapping[str, Tensor]
"""Strings, or what the model's tokenizer makes of them."""

VideoInput = Tensor | Mapping[str, Tensor]
"""Frames [V, T, 3, H, W], uint8 pixels or normalised floats; or a dict of tensors, for models that read features."""


class SideFlops(NamedTuple):
    """Forward FLOPs, a multiply-add counted as 2.

    Attributes:
        video: of one clip, what is computed.
        nominal_video: of one clip, the published model.
        text: of one caption.
        pair: of one comparison.
        frozen: the share of video and text that has no backward pass.
    """

    video: float
    nominal_video: float
    text: float
    pair: float
    frozen: float


class RetrievalModel(nn.Module, ABC):
    """A model that ranks clips by a caption and captions by a clip.

    Attributes:
        kind: its name in frozen_fast.config.extensions.models, written to config.json.
        task: what it learns, a name in frozen_fast.config.extensions.tasks.
        learned_frames: most frames per clip that the model takes now.
        mean, std: RGB normalisation of the frames that the model was trained with, in [0, 1]; None: it takes no frames.
        takes_frame_masks: whether video_features reads {"video", "frame_mask"}, for padded short clips.
        loss_scale: the scale of similarities that the loss learns with the model; None: a fixed temperature.
        run: what the checkpoint says of the run that wrote it (read_run); empty without a run.
    """

    kind: str
    task: str = "retrieval"
    learned_frames: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    takes_frame_masks: bool = False
    run: Mapping[str, Any] = MappingProxyType({})
    loss_scale: LearnedScale | None

    def __init__(self) -> None:
        """A model without a learned scale; a default on the class would hide a module that is assigned later."""
        super().__init__()
        self.loss_scale = None

    @classmethod
    def from_config(cls, config: ModelConfig) -> RetrievalModel:
        """Build the model that a config's model section describes, or load its model.checkpoint to train on.

        Raises:
            UserError: a key under model; or the model cannot be trained from a config.
        """
        raise UserError(f"model.kind: got {cls.kind!r}, which is loaded from files only; allowed: a kind that trains")

    @property
    @abstractmethod
    def tokenizer(self) -> Callable[[list[str]], dict[str, Tensor]] | None:
        """Turns texts into what text_features takes; None: only ready tensors are taken."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def resolution(self) -> int:
        """Height and width of the frames that the model takes; models that take none do not have it."""
        raise NotImplementedError(f"{type(self).__name__} takes no frames")

    @abstractmethod
    def text_features(self, text: TextInput) -> Features:
        """Encode captions, before any normalisation; differentiable, follows train() and eval().

        Args:
            text: Q captions.

        Returns:
            Tensors with first axis Q.
        """

    @abstractmethod
    def video_features(self, video: VideoInput) -> Features:
        """Encode clips, before any normalisation; differentiable, follows train() and eval().

        Args:
            video: V clips.

        Returns:
            Tensors with first axis V.
        """

    @abstractmethod
    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Compare every caption with every clip.

        It reads features only, no parameters: sharding strategies gather parameters in forward() alone. What the
        similarity needs of a parameter (a logit scale, mixture weights) is part of the features.

        Args:
            text: features of Q captions, floating tensors.
            video: features of V clips, floating tensors (masks as 0 and 1).

        Returns:
            sim_KQV in fp32. The model ranks by the mean over K; training takes the loss of each of the K and averages
            (CLIP2Video has K = 2, the others K = 1).
        """

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What config.json holds: all that from_pretrained needs beside weights and tokenizer, as JSON-able data."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights, config.json and tokenizer; `state` replaces the model's own weights (gathered from shards)."""

    def forward(self, video: VideoInput, text: TextInput) -> tuple[Features, Features, Features]:
        """Features of both sides, and the loss's own parameters, through the module that a strategy wraps.

        Returns:
            (text features, video features, loss parameters: "logit_scale" and "logit_bias" where they are learned).
        """
        return self.text_features(text), self.video_features(video), self.loss_parameters()

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that make up most of the model: units of sharding."""
        return find_repeated_blocks(self)

    def compiled_parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """What training.compile compiles: modules whose shapes a stage fixes, and those whose shapes do not stay."""
        return (), ()

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Settle what is chosen by measurement, as VideoTower.choose_kernels."""

    def side_flops(self, frames: int, tokens: int) -> SideFlops | None:
        """Forward FLOPs of a clip of T frames and a caption of L tokens; None where they are not known."""
        return None

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Entries of environment.json that say which kernels ran so far, for the report."""
        return {}

    def loss_parameters(self) -> Features:
        """Scalars that the loss learns with the model; none unless a model has them."""
        return {} if self.loss_scale is None else self.loss_scale()

    def similarity(self, text: TextInput, video: VideoInput, **options: Any) -> Tensor:
        """The number that ranks, for every caption and clip.

        Args:
            text: Q captions.
            video: V clips.
            options: what else a model needs of a clip, such as frame_mask=[V, T].

        Returns:
            sim_QV, fp32.
        """
        return self.pair_similarities(self.text_features(text), self.video_features(video, **options)).mean(0)

    def merge_windows(self, windows: Sequence[Features]) -> Features:
        """One clip's features from those of its test windows, each with first axis 1: the mean of every tensor."""
        return {name: torch.stack([window[name] for window in windows]).mean(0) for name in windows[0]}

    @property
    def vector_width(self) -> int:
        """D of vectors().

        Raises:
            UserError: as vectors.
        """
        raise self._no_vectors()

    def vectors(self, features: Features) -> Tensor:
        """One vector for each caption or clip, whose dot products rank as the model does: what a search index holds.

        Args:
            features: of N captions or of N clips.

        Returns:
            [N, D] fp32, rows of L2 norm 1.

        Raises:
            UserError: the model's similarity is no dot product of two vectors.
        """
        raise self._no_vectors()

    def _no_vectors(self) -> UserError:
        return UserError(
            f"checkpoint: got a model of kind {self.kind!r}, whose similarity is no dot product of two vectors; "
            "allowed: a kind with one vector for each clip (frozen, clip2video)"
        )

    def embed_videos(
        self,
        clips: Sequence[Any],
        frames: int | None = None,
        windows: str | int = "auto",
        *,
        batch_size: int = 32,
        workers: int = 0,
        decoder: str | None = None,
        on_bad_clip: str = "error",
    ) -> Tensor:
        """Embed clips from their files: decode, transform, encode the test windows, average per clip, normalise.

        The windows, frames and decoder are those with which the checkpoint's run was evaluated, and the rows equal the
        embeddings that evaluation compares. A model without a run takes the evaluation section's defaults.

        Args:
            clips: paths of videos and pictures, or frozen_fast.data.Clip objects (which may name a part of a file).
            frames: frames of a window, up to learned_frames; None: the run's.
            windows: "auto": the run's test windows; "middle": one; a number: at most that many per clip.
            batch_size: windows per forward pass.
            workers: loader processes; 0: a background thread.
            decoder: backend that reads frames; None: the run's.
            on_bad_clip: "error", or "nan": a clip that cannot be read gives a row of NaN.

        Returns:
            [V, D] fp32 on the CPU, rows of L2 norm 1, in the order of `clips`.

        Raises:
            UserError: a clip cannot be read (with on_bad_clip="error"), an argument is out of range, or as vectors.
        """
        return model_methods.load("embed_videos")(
            self,
            clips,
            frames=frames,
            windows=windows,
            batch_size=batch_size,
            workers=workers,
            decoder=decoder,
            on_bad_clip=on_bad_clip,
        )
