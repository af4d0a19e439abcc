"""The interface of all models: features of captions and of clips, and their similarity.

A model encodes captions and clips separately into features (a dict of tensors whose first axis is the caption or the
clip), and compares two sets of features. Training, evaluation and search use this interface only. The features of a
dual encoder are one embedding, and the similarity is a dot product. Other models have several tensors per clip and
compare them differently.

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
"""Strings, or the output of the model's tokenizer."""

VideoInput = Tensor | Mapping[str, Tensor]
"""Frames [V, T, 3, H, W], uint8 pixels or normalised floats; or a dict of tensors, for models that read features."""


class SideFlops(NamedTuple):
    """Forward FLOPs, a multiply-add counted as 2.

    Attributes:
        video: FLOPs of one clip, as computed.
        nominal_video: FLOPs of one clip in the published model.
        text: FLOPs of one caption.
        pair: FLOPs of one comparison.
        frozen: share of video and text without a backward pass.
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
        task: its training task, a name in frozen_fast.config.extensions.tasks.
        learned_frames: largest number of frames per clip at present.
        mean, std: RGB normalisation of the training data, in [0, 1]; None: the model reads no frames.
        takes_frame_masks: whether video_features accepts {"video", "frame_mask"}, for padded short clips.
        loss_scale: learned scale of the similarities in the loss; None: a fixed temperature.
        run: the checkpoint's data on the run that wrote it (read_run); empty without a run.
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
        """Initialise without a learned scale (a class attribute would hide a module that is assigned later)."""
        super().__init__()
        self.loss_scale = None

    @classmethod
    def from_config(cls, config: ModelConfig) -> RetrievalModel:
        """Build the model of a config's model section for training, or load its model.checkpoint.

        Raises:
            UserError: naming a key under model, or if models of this kind cannot be trained from a config.
        """
        raise UserError(
            f"model.kind: got {cls.kind!r}, which is loaded from files only; allowed: a kind that can be trained"
        )

    @property
    @abstractmethod
    def tokenizer(self) -> Callable[[list[str]], dict[str, Tensor]] | None:
        """Converts texts to the input of text_features; None: the model accepts tensors only."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    def resolution(self) -> int:
        """Height and width of the model's frames; an error for models that read no frames."""
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

        This reads features but no parameters, because sharding strategies gather parameters in forward() only. Values
        that depend on parameters (a logit scale, mixture weights) are part of the features.

        Args:
            text: features of Q captions, floating tensors.
            video: features of V clips, floating tensors (masks as 0 and 1).

        Returns:
            sim_KQV in fp32. The model ranks by the mean over K; training averages the K losses (K = 2 for CLIP2Video, K
            = 1 for other models).
        """

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json: what from_pretrained needs in addition to weights and tokenizer."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights, config.json and tokenizer; `state` replaces the model's own weights (gathered from shards)."""

    def forward(self, video: VideoInput, text: TextInput) -> tuple[Features, Features, Features]:
        """Compute the features of both sides, and return the loss's parameters.

        Returns:
            (text features, video features, loss parameters: "logit_scale" and "logit_bias" if they are learned).
        """
        return self.text_features(text), self.video_features(video), self.loss_parameters()

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks that make up most of the model, the units of sharding."""
        return find_repeated_blocks(self)

    def compiled_parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """Return the modules that training.compile compiles with static shapes, and those with dynamic shapes."""
        return (), ()

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Choose kernels by measurement; see VideoTower.choose_kernels."""

    def side_flops(self, frames: int, tokens: int) -> SideFlops | None:
        """Return the forward FLOPs of a clip of T frames and a caption of L tokens; None if unknown."""
        return None

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Return entries of environment.json on the kernels that have run, for the report."""
        return {}

    def loss_parameters(self) -> Features:
        """Return the scalars that the loss learns with the model; empty by default."""
        return {} if self.loss_scale is None else self.loss_scale()

    def similarity(self, text: TextInput, video: VideoInput, **options: Any) -> Tensor:
        """Compute the similarity for ranking of every caption and clip.

        Args:
            text: Q captions.
            video: V clips.
            options: further inputs for clips, such as frame_mask=[V, T].

        Returns:
            sim_QV, fp32.
        """
        return self.pair_similarities(self.text_features(text), self.video_features(video, **options)).mean(0)

    def merge_windows(self, windows: Sequence[Features]) -> Features:
        """Merge the features of a clip's test windows, each with first axis 1, by the mean of every tensor."""
        return {name: torch.stack([window[name] for window in windows]).mean(0) for name in windows[0]}

    @property
    def vector_width(self) -> int:
        """D of vectors().

        Raises:
            UserError: as vectors.
        """
        raise self._no_vectors()

    def vectors(self, features: Features) -> Tensor:
        """Return one vector per caption or clip for a search index; their dot products rank as the model does.

        Args:
            features: features of N captions or of N clips.

        Returns:
            [N, D] fp32, rows of L2 norm 1.

        Raises:
            UserError: the model's similarity is not a dot product of two vectors.
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

        Windows, frames and decoder default to those of the evaluation of the checkpoint's run, so that the rows equal
        the embeddings that evaluation compares. A model without a run uses the defaults of the evaluation section.

        Args:
            clips: paths of videos and images, or frozen_fast.data.Clip objects (which may select a time range of a
                file).
            frames: frames of a window, up to learned_frames; None: the run's.
            windows: "auto": the run's test windows; "middle": one; a number: at most that many per clip.
            batch_size: windows per forward pass.
            workers: loader processes; 0: a background thread.
            decoder: backend that reads frames; None: the run's.
            on_bad_clip: "error", or "nan" for a row of NaN if a clip cannot be read.

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
