"""Loads frames of a video or picture and transforms them to a model's input, for notebooks and scripts.

Axis letters: T frames, H and W pixels, R a model's resolution.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from frozen_fast.data.decode import Kind
from frozen_fast.data.decode.pictures import read_picture
from frozen_fast.data.decode.probe import clip_index
from frozen_fast.data.decode.pyav import read_frames
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.decode.types import ClipError, TestView
from frozen_fast.data.load.for_model import RESIZE_RESOLUTION, FrameFormat
from frozen_fast.data.plan.frame_sampling import test_windows
from frozen_fast.errors import UserError

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())
MAX_PIXELS = 50_000_000
DEFAULT_RESIZE = 256


def kind_of(path: str | Path) -> Kind:
    """Return "image" or "video", by the file's suffix."""
    return "image" if os.path.splitext(os.fspath(path))[1].lower() in IMAGE_SUFFIXES else "video"


def load_video(
    path: str | Path,
    frames: int = 8,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Load frames of a video: the middle frame of each of `frames` equal segments. A picture has one frame.

    Args:
        path: the file; its suffix decides whether it is a picture.
        frames: T; a video with fewer frames repeats them.
        start_seconds: start of the clip in the file; None: the beginning.
        end_seconds: end of the clip; None: the end of the file.
        max_pixels: a larger frame is an error.

    Returns:
        uint8 RGB, upright, [T, 3, H, W] (a picture: [1, 3, H, W]). transforms(model) converts it to a model's input.

    Raises:
        UserError: the file cannot be read, or frames is below 1.
    """
    if frames < 1:
        raise UserError(f"frames: got {frames}; allowed: from 1")
    try:
        if kind_of(path) == "image":
            frames_THWC = read_picture(os.fspath(path), max_pixels=max_pixels)
        else:
            index = clip_index(path, max_pixels=max_pixels)
            first, last = index.info.frame_range(start_seconds, end_seconds)
            (wanted,) = test_windows(last - first, frames, stride_frames=0)
            distinct, order = np.unique(np.array(wanted) + first, return_inverse=True)
            frames_THWC = read_frames(os.fspath(path), index, distinct.tolist(), max_pixels)[order]
    except ClipError as error:
        got = f"got {os.fspath(path)!r}, which cannot be read ({error.cause}: {error.message})"
        raise UserError(f"path: {got}; allowed: a video or a picture") from None
    return torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2)


class TakesFrames(Protocol):
    """A model that takes frames."""

    @property
    def kind(self) -> str:
        """Its name."""
        ...

    @property
    def mean(self) -> tuple[float, ...] | None:
        """RGB normalisation; None: it takes no frames."""
        ...

    @property
    def std(self) -> tuple[float, ...] | None:
        """Likewise."""
        ...

    @property
    def resolution(self) -> int:
        """Side of its frames, pixels."""
        ...


def format_of(model: TakesFrames) -> FrameFormat:
    """The frames that a model takes.

    Raises:
        UserError: it takes none.
    """
    mean, std = model.mean, model.std
    if mean is None or std is None:
        raise UserError(f"model: got a {model.kind}, which reads features of clips; allowed: a model that reads frames")
    return FrameFormat(model.resolution, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def transforms(model: TakesFrames, *, resize: int = DEFAULT_RESIZE) -> TestTransform:
    """Return the transform from load_video's frames to a model's input: resize, centre crop, normalise.

    Args:
        model: provides resolution, mean and std.
        resize: short side before the centre crop, for a 224 model (evaluation.resize).
    """
    return TestTransform(format_of(model), resize=resize)


class TestTransform:
    """Transforms uint8 frames of any size to a model's input: resize, centre crop, normalise."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    def __init__(self, format: FrameFormat, *, resize: int = DEFAULT_RESIZE) -> None:
        """Set up the transform.

        Args:
            format: the frames that the model takes.
            resize: short side before the centre crop, for a 224 model (evaluation.resize).
        """
        self._view = TestView(max(1, round(resize * format.resolution / RESIZE_RESOLUTION)))
        self._transform = ViewTransform(format.resolution)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (format.mean, format.std))

    def __call__(self, frames_TCHW: Tensor) -> Tensor:
        """Transform uint8 frames [T, 3, H, W] to normalised float32 [T, 3, R, R].

        Raises:
            UserError: another shape or dtype.
        """
        if frames_TCHW.dim() != 4 or frames_TCHW.shape[1] != 3 or frames_TCHW.dtype != torch.uint8:
            got = f"{list(frames_TCHW.shape)} {frames_TCHW.dtype}"
            raise UserError(f"frames: got {got}; allowed: uint8 [T, 3, H, W], as load_video gives")
        frames_THWC = frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy()
        pixels_TCRR = self._transform(frames_THWC, self._view, "tensor").frames_TCHW
        return torch.addcmul(-self._mean / self._std, pixels_TCRR.float(), 1 / (255 * self._std))
