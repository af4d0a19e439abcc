"""Types of decoding: requests, views, decoded frames, and ClipError.

Axis letters: T frames, C channels (RGB), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Kind = Literal["video", "image"]
"""Kind of a clip's file."""
Cause = Literal[
    "missing", "directory", "empty", "not_a_video", "no_frames", "too_large", "truncated", "decode_failed", "timeout"
]
"""Why a clip cannot be read; see ClipError."""


class ClipError(Exception):
    """A clip that cannot be read. A caller may replace the clip and continue.

    Attributes:
        cause: missing, directory, empty (zero bytes), not_a_video (or not an image, if one was requested),
            no_frames (audio only), too_large (more pixels than allowed), truncated (fewer bytes or frames than the
            file claims), decode_failed, timeout.
        message: one line for a log, without the path.
        path: the file; empty if it is not known.
    """

    def __init__(self, cause: Cause, message: str, path: str | Path = "") -> None:
        super().__init__(cause, message, str(path))
        self.cause = cause
        self.message = message
        self.path = str(path)

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}: {self.message}" if self.path else f"{self.cause}: {self.message}"


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or picture file.

    Attributes:
        num_frames: number of frames that can be decoded, counted, not taken from the header.
        frames_per_second: mean rate over the presentation times; 1.0 for an image or a single frame without a rate.
        width: pixels after applying the rotation tag, as every backend returns them.
        height: likewise.
        codec: FFmpeg's name of the codec, such as "vp9", "h264", "mjpeg"; "image" for a picture.
        rotation_degrees: clockwise turn (0, 90, 180, 270) that makes the stored frames upright; already in
            width and height, and every backend applies it. 0 for a picture.
        presentation_seconds: [num_frames] float64, ascending, the first is 0: when each frame appears.
    """

    num_frames: int
    frames_per_second: float
    width: int
    height: int
    codec: str
    rotation_degrees: int = 0
    presentation_seconds: np.ndarray = field(default_factory=lambda: np.zeros(1), compare=False, repr=False)

    def frame_range(self, start_seconds: float | None, end_seconds: float | None) -> tuple[int, int]:
        """The range of frames between two times, from the presentation times (also for variable rates).

        Args:
            start_seconds: seconds after the first frame; None: the clip's beginning.
            end_seconds: likewise, exclusive; None: the clip's end.

        Returns:
            (first, last_exclusive) with at least one frame: the frame on screen at start_seconds is the first, and
            the last is the one before the first frame that appears at or after end_seconds. Times past the end
            give the last frame.
        """
        times = self.presentation_seconds
        tolerance = 1e-6  # manifests hold rounded decimals, containers hold milliseconds
        first = 0
        if start_seconds is not None:
            first = int(np.searchsorted(times, start_seconds + tolerance, side="right")) - 1
        first = min(max(first, 0), self.num_frames - 1)
        last = self.num_frames
        if end_seconds is not None:
            last = int(np.searchsorted(times, end_seconds - tolerance, side="left"))
        return first, min(max(last, first + 1), self.num_frames)


@dataclass(frozen=True)
class TrainView:
    """One crop and one flip for all frames of a clip: crop (upright source pixels), resize, flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class TestView:
    """Short side to `resize`, a crop of `resize` x `resize`, then resize to the resolution.

    Attributes:
        resize: pixels.
        place: where the crop lies along the longer side: its beginning (left or top), its centre or its end.
    """

    __test__ = False  # not a test class, despite its name

    resize: int
    place: Literal["begin", "centre", "end"] = "centre"


@dataclass(frozen=True)
class DecodeRequest:
    """One clip to decode: frame indices (any order, repeats allowed) and a view."""

    path: str | Path
    kind: Kind
    frame_indices: tuple[int, ...]
    view: TrainView | TestView


@dataclass(frozen=True)
class Decoded:
    """One decoded clip.

    Attributes:
        frames_TCHW: uint8 RGB, [T, 3, resolution, resolution]; a decoder of crops (ViewTransform) gives the crop of the
            stored frames, [T, 3, h, w].
        backend: the backend that decoded it ("dali", "torchcodec", "decord", "pyav"; for pictures "dali" or "pil").
        flip: for a crop, whether it is mirrored after the resize; None: the frames are not resized any more.
    """

    frames_TCHW: Tensor
    backend: str
    flip: bool | None = None

    def ordered(self, order: np.ndarray) -> Decoded:
        """The frames with these places, [T] whole numbers; itself where that changes nothing."""
        if len(order) == len(self.frames_TCHW) and (np.diff(order) == 1).all():
            return self
        return replace(self, frames_TCHW=self.frames_TCHW[torch.from_numpy(order).to(self.frames_TCHW.device)])


class Decoder(Protocol):
    """Decodes requests. Create one object per process and thread, after a fork."""

    name: str

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place and does not affect other clips."""
        ...

    def close(self) -> None:
        """Release the decoder's resources; it cannot be used afterwards."""
        ...
