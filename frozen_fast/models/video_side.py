"""The video side of models with a video tower: its input clips, and the expansion to more frames between stages.

Axis letters: B batch, T frames, C channels, H and W pixels, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.models.video.temporal import expand_temporal_embedding
from frozen_fast.models.video.video_tower import IMAGENET_MEAN, IMAGENET_STD, VideoTower, frames_in_words

LARGEST_NORMALISED = 10.0
"""Floats this many times beyond the range of normalised pixels (by mean and std) are taken for raw pixels."""


class VideoSide(RetrievalModel):
    """A model with a video tower.

    Attributes:
        video_model: the tower.
        learned_frames: largest number of frames per clip at present: the number of learned rows of the video tower's
            frame embeddings, or the number of frames in training if it has none.
        mean, std: RGB normalisation of the training data, in [0, 1], which is applied to uint8 clips.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        video_model: VideoTower,
        *,
        learned_frames: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """Initialise with the tower.

        Args:
            video_model: the video tower.
            learned_frames: None: the tower's max_frames.
            mean: mean of the training data's pixels, RGB in [0, 1].
            std: their standard deviation.
        """
        super().__init__()
        self.video_model = video_model
        self.learned_frames = video_model.max_frames if learned_frames is None else learned_frames
        if not 1 <= self.learned_frames <= video_model.max_frames:
            raise UserError(f"learned_frames: got {self.learned_frames}; allowed: 1 to {video_model.max_frames}")
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean, std: got {self.mean}, {self.std}; allowed: three numbers each, std above 0")
        self.pixels = PixelNormalisation(self.mean, self.std)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def resolution(self) -> int:
        """R: frames are R x R pixels."""
        return self.video_model.resolution

    def tower_output(self, video_BTCHW: Tensor) -> Tensor:
        """Return the video tower's output; follows train() and eval(), differentiable.

        Args:
            video_BTCHW: [B, T, 3, R, R] with the tower's resolution R and 1 <= T <= learned_frames; normalised floats,
                or uint8 pixels, which this method normalises.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape or dtype, or more frames than there are learned temporal embeddings for.
        """
        if not isinstance(video_BTCHW, Tensor):
            raise ValueError(f"video: got {type(video_BTCHW).__name__}; allowed: a tensor [B, T, 3, H, W]")
        if video_BTCHW.dim() == 5 and self.learned_frames < video_BTCHW.shape[1]:
            raise ValueError(
                f"video: got {video_BTCHW.shape[1]} frames; allowed: up to {self.learned_frames}, those with a learned "
                "temporal embedding (from_pretrained(..., num_frames=T) or expand_frames(T, method) makes more)"
            )
        self.video_model.check_video(video_BTCHW)
        output_BD: Tensor
        if self.video_model.folds_normalisation and video_BTCHW.dtype == torch.uint8 and self.device.type == "cuda":
            output_BD = self.video_model(video_BTCHW.to(self.device), self.pixels)
        else:
            output_BD = self.video_model(self._normalised(video_BTCHW))
        return output_BD

    def _normalised(self, video_BTCHW: Tensor) -> Tensor:
        """Move a clip batch to the weights' device as normalised floats of their dtype."""
        dtype = next(self.parameters()).dtype
        self._check_range(video_BTCHW)
        video = video_BTCHW.to(self.device)
        if video.is_floating_point():
            return video.to(dtype)
        if video.dtype != torch.uint8:
            raise ValueError(f"video: got dtype {video.dtype}; allowed: normalised floats, or uint8")
        return self.pixels(video).to(dtype)

    def _check_range(self, video: Tensor) -> None:
        """Refuse float pixels that are not normalised; skipped in training on a CUDA device, which it would block."""
        if not video.is_floating_point() or (video.is_cuda and torch.is_grad_enabled()):
            return
        if torch.compiler.is_exporting():  # an exported program cannot inspect values
            return
        bound = max(max(mean, 1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        largest = float(video.detach().abs().amax())
        if largest > LARGEST_NORMALISED * bound:
            raise ValueError(
                f"video: got floats up to {largest:.4g}; allowed: floats normalised with the model's mean and std "
                f"(up to about {bound:.2g}), or uint8 pixels, which are normalised here"
            )

    def frame_embeddings(self) -> list[str]:
        """Return the names of the parameters [1, max_frames, D] that are expanded with the number of frames."""
        return [f"video_model.{name}" for name in self.video_model.frame_embeddings]

    def expand_frames(self, num_frames: int, method: str = "zero") -> None:
        """Expand the frame embeddings in place to num_frames learned rows.

        From one frame, "nearest" and "bilinear" make all rows equal, and "zero" makes all but the first zero. The
        initial values of the new rows (temporal_init_std, 0 by default) are added, so that frames can differ from the
        start.

        Args:
            num_frames: up to the tower's max_frames; learned_frames or fewer changes nothing.
            method: "zero", "nearest" or "bilinear" (temporal.expand_temporal_embedding).

        Raises:
            UserError: more frames than the tower's max_frames.
        """
        if not 1 <= num_frames <= self.video_model.max_frames:
            allowed = f"1 to {self.video_model.max_frames}, the tower's max_frames"
            raise UserError(f"num_frames: got {num_frames}; allowed: {allowed}")
        if num_frames <= self.learned_frames:
            return
        with torch.no_grad():
            for name in self.frame_embeddings():
                embed = self.get_parameter(name)
                expanded = expand_temporal_embedding(embed[:, : self.learned_frames], num_frames, method)
                if self.learned_frames == 1:
                    expanded[:, 1:] += embed[:, 1:num_frames]
                embed[:, :num_frames] = expanded
        self.learned_frames = num_frames

    def compiled_parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """Return the video tower's blocks."""
        return self.video_model.repeated_blocks(), ()

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """See VideoTower.choose_kernels."""
        self.video_model.choose_kernels(batch_sizes, device, dtype)

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """See VideoTower."""
        return self.video_model.kernels_used(device, compiled=compiled)

    def fit_frame_rows(
        self,
        state: dict[str, Tensor],
        learned_frames: int,
        num_frames: int | None,
        method: str,
        path: Path,
    ) -> None:
        """Truncate or expand the frame embeddings in a checkpoint's weights to this model's rows, in place.

        Args:
            state: weights by name.
            learned_frames: rows that the checkpoint learned.
            num_frames: frames that the model takes; None: those that the checkpoint learned.
            method: "zero", "nearest" or "bilinear".
            path: the checkpoint, for messages.

        Raises:
            UserError: the weights do not have these rows.
        """
        for name in self.frame_embeddings():
            rows_1TD = state.get(name)
            if rows_1TD is None or rows_1TD.dim() != 3 or not 1 <= learned_frames <= rows_1TD.shape[1]:
                shape = None if rows_1TD is None else list(rows_1TD.shape)
                raise UserError(
                    f"checkpoint: got {path}, where {name} has shape {shape} and {learned_frames} learned frames"
                )
            if num_frames is not None:
                rows_1TD = expand_temporal_embedding(rows_1TD[:, :learned_frames], num_frames, method)
            state[name] = expand_temporal_embedding(rows_1TD, self.video_model.max_frames, "zero")


def stored_tower(
    tower: type[VideoTower], told: Mapping[str, Any], num_frames: int | None, max_frames: int | None, section: Any
) -> tuple[VideoTower, int]:
    """Build a checkpoint's video tower without its weights.

    Args:
        tower: the class.
        told: the architecture of the checkpoint, of which "video" and "learned_frames" are read.
        num_frames: frames that the model takes; None: those that the checkpoint learned.
        max_frames: rows of the frame embeddings to allocate; None: num_frames.
        section: model.video, of which keys that select how the tower computes are read.

    Returns:
        (the tower, the number of learned frames).

    Raises:
        UserError: the tower does not support this number of frames.
    """
    learned = told["learned_frames"] if num_frames is None else num_frames
    if learned < 1:
        raise UserError(f"num_frames: got {learned}; allowed: 1 or more")
    video = tower.from_architecture(told["video"], max_frames=max(learned, max_frames or learned), section=section)
    if learned not in video.frames:
        allowed = frames_in_words(video.frames)
        raise UserError(f"num_frames: got {learned}; allowed: {allowed}, which the checkpoint's tower supports")
    return video, learned
