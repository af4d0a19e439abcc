"""Transforms decoded frames to the model's resolution with torchvision: crop, resize, flip.

Axis letters: T frames, C channels (RGB), H and W pixels, R the resolution.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from frozen_fast.data.decode.geometry import view_steps
from frozen_fast.data.decode.types import Decoded, TestView, TrainView

MOST_CROP_PIXELS = 2.0
"""A crop with more pixels than this many times R x R is resized where it is decoded: copying it would cost more."""


class ViewTransform:
    """Applies a view to a clip's frames: bilinear with antialiasing, rounded to 8 bits after each resize."""

    def __init__(self, resolution: int, *, crops_only: bool = False) -> None:
        """Hold the settings.

        Args:
            resolution: R.
            crops_only: leave resize and flip of training crops to data.load.crops.resize_crops, except for large crops.
        """
        self._size = [resolution, resolution]
        self._crops_only = crops_only

    def __call__(self, frames_THWC: np.ndarray, view: TrainView | TestView, backend: str) -> Decoded:
        """Transform upright uint8 frames [T, H, W, 3] of a backend."""
        steps = view_steps(view, frames_THWC.shape[1], frames_THWC.shape[2])
        frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
        if steps.size is not None:
            frames_TCHW = self._resize(frames_TCHW, list(steps.size))
        frames_TCHW = F.crop(frames_TCHW, *steps.box)
        small = steps.box.height * steps.box.width <= MOST_CROP_PIXELS * self._size[0] * self._size[1]
        if self._crops_only and isinstance(view, TrainView) and small:
            return Decoded(frames_TCHW, backend, flip=steps.flip)
        frames_TCHW = self._resize(frames_TCHW, self._size)
        if steps.flip:
            frames_TCHW = frames_TCHW.flip(-1)
        return Decoded(frames_TCHW.contiguous(), backend)

    @staticmethod
    def _resize(frames_TCHW: Tensor, size: list[int]) -> Tensor:
        if list(frames_TCHW.shape[-2:]) == size:
            return frames_TCHW
        return F.resize(frames_TCHW, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
