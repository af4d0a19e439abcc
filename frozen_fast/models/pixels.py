"""Normalisation of uint8 pixels on the model's device.

Axis letters: B batch, T frames, C channels (RGB), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class PixelNormalisation(nn.Module):
    """(pixel / 255 - mean) / std, as one multiplication and one addition.

    Scale and shift are a buffer, so that no call copies them to the device. The buffer is not part of the state dict
    and stays float32 when the model is cast.
    """

    coefficients: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Initialise with the statistics.

        Args:
            mean: mean of the training data's pixels, RGB in [0, 1].
            std: their standard deviation.
        """
        super().__init__()
        self._scale = [1 / (255 * one) for one in std]
        self._shift = [-one / other for one, other in zip(mean, std, strict=True)]
        self.register_buffer("coefficients", torch.tensor([self._scale, self._shift]), persistent=False)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """Move the buffer and rewrite its values, because to_empty() leaves them undefined and a cast rounds them."""
        super()._apply(fn, recurse)
        self.coefficients = torch.tensor([self._scale, self._shift], device=self.coefficients.device)
        return self

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return factor and summand, float32 [3] each."""
        scale_C, shift_C = self.coefficients
        return scale_C, shift_C

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Normalise uint8 pixels [..., 3, H, W] to float32."""
        scale_C, shift_C = self.coefficients
        return torch.addcmul(shift_C[:, None, None], video_BTCHW.float(), scale_C[:, None, None])
