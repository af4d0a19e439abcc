"""Transforms decoded frames to the model's input with torchvision: crop, resize, flip, normalise.

Axis letters: T frames, C channels (RGB), H and W pixels, R the resolution.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from frozen_fast.data.decode.geometry import view_steps
from frozen_fast.data.decode.types import TestView, TrainView


class ViewTransform:
    """Applies a view to a clip's frames: bilinear with antialiasing, rounded to 8 bits after each resize."""

    def __init__(
        self,
        resolution: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
    ) -> None:
        self._size = [resolution, resolution]
        self._device = device
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(3, 1, 1)

    def __call__(self, frames_THWC: np.ndarray, view: TrainView | TestView) -> Tensor:
        """Transform upright uint8 frames [T, H, W, 3] to normalised float32 [T, 3, R, R] on the device."""
        steps = view_steps(view, frames_THWC.shape[1], frames_THWC.shape[2])
        frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
        if steps.size is None:
            frames_TCHW = F.crop(frames_TCHW, *steps.box).to(self._device, non_blocking=True)
        else:
            frames_TCHW = frames_TCHW.to(self._device, non_blocking=True)
            frames_TCHW = F.crop(self._resize(frames_TCHW, list(steps.size)), *steps.box)
        frames_TCHW = self._resize(frames_TCHW, self._size)
        if steps.flip:
            frames_TCHW = frames_TCHW.flip(-1)
        return torch.addcmul(self._shift, frames_TCHW.float(), self._scale).contiguous()

    @staticmethod
    def _resize(frames_TCHW: Tensor, size: list[int]) -> Tensor:
        if list(frames_TCHW.shape[-2:]) == size:
            return frames_TCHW
        return F.resize(frames_TCHW, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
