"""Extracts JPEG frames from a clip; runs in the packing processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from frozen_fast.data.decode.geometry import view_steps
from frozen_fast.data.decode.pictures import read_picture
from frozen_fast.data.decode.probe import clip_index, probe
from frozen_fast.data.decode.pyav import read_frames
from frozen_fast.data.decode.types import ClipError, TestView
from frozen_fast.data.load.training_loader import probe_clip
from frozen_fast.data.plan.frame_sampling import test_windows
from frozen_fast.data.shards import jpeg
from frozen_fast.data.sources import Clip
from frozen_fast.errors import UserError

_ALLOWED = {"frames_per_clip": (1, 100_000), "short_side": (16, 4096), "quality": (30, 100), "shard_bytes": (1, 2**40)}


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Settings of the frames that packing stores.

    Attributes:
        frames_per_clip: stored frames, F: the middle frame of each of F equal segments. If T divides F, training with
            T frames draws exactly one stored frame from each of T equal segments of the clip.
        short_side: a larger frame is shrunk to this short side, pixels; a smaller one keeps its size.
        quality: of the JPEGs, of libjpeg.
        shard_bytes: largest size of a shard (unless a single clip is larger).
    """

    frames_per_clip: int = 8
    short_side: int = 256
    quality: int = 90
    shard_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, (low, high) in _ALLOWED.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')}: got {value}; allowed: {low} to {high}")

    def to_json(self) -> dict[str, Any]:
        """As pack.json holds it."""
        return asdict(self)


@dataclass(frozen=True)
class StoredFrames:
    """The stored frames of one clip.

    Attributes:
        jpegs: the files.
        numbers: their frame numbers in the clip, from 0.
        seconds: when each appears, from the clip's first frame.
        height: pixels.
        width: pixels.
        original_frames: frames that the clip has.
        frames_per_second: stored frames per second of the clip.
    """

    jpegs: list[bytes] = field(repr=False)
    numbers: list[int]
    seconds: list[float]
    height: int
    width: int
    original_frames: int
    frames_per_second: float


def frames_to_store(available: int, wanted: int) -> list[int]:
    """The middle frame of each of `wanted` equal segments; every frame of a clip with fewer."""
    return test_windows(available, min(available, wanted), stride_frames=0)[0]


def extract(clip: Clip, settings: PackSettings, max_pixels: int) -> StoredFrames | ClipError:
    """Decode, shrink and compress a clip's frames; for an unreadable clip, return the error."""
    try:
        return _extracted(clip, settings, max_pixels)
    except ClipError as error:
        error.__traceback__ = None
        return error
    except OSError as error:
        return ClipError("decode_failed", f"cannot be read: {error.strerror or error}", clip.path)


def _extracted(clip: Clip, settings: PackSettings, max_pixels: int) -> StoredFrames:
    info, available = probe_clip(clip, probe, max_pixels)
    numbers = frames_to_store(len(available), settings.frames_per_clip)
    if clip.kind == "image":
        frames_NHWC = read_picture(clip.path, max_pixels=max_pixels)
    else:
        index = clip_index(clip.path, max_pixels=max_pixels)
        frames_NHWC = read_frames(clip.path, index, [available[number] for number in numbers], max_pixels)
    frames_NHWC = shrink(frames_NHWC, settings.short_side)
    times = info.presentation_seconds[list(available)]
    seconds = (times[numbers] - times[0]).tolist()
    # The last frame is on screen for as long as a mean one.
    length_seconds = float(times[-1] - times[0]) + 1 / info.frames_per_second
    return StoredFrames(
        jpegs=[jpeg.encode(frame, settings.quality) for frame in frames_NHWC],
        numbers=numbers,
        seconds=seconds,
        height=frames_NHWC.shape[1],
        width=frames_NHWC.shape[2],
        original_frames=len(available),
        frames_per_second=len(numbers) / length_seconds,
    )


def shrink(frames_NHWC: np.ndarray, short_side: int) -> np.ndarray:
    """Bilinear with antialiasing, to the size that evaluation's resize gives; never enlarged.

    Args:
        frames_NHWC: uint8 [N, H, W, 3].
        short_side: of the result, pixels.
    """
    height, width = frames_NHWC.shape[1:3]
    size = view_steps(TestView(short_side), height, width).size
    if min(height, width) <= short_side or size is None:
        return frames_NHWC
    frames_NCHW = torch.from_numpy(np.ascontiguousarray(frames_NHWC)).permute(0, 3, 1, 2)
    small_NCHW = F.resize(frames_NCHW, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return small_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
