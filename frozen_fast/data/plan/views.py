"""Random crop and flip of a training clip: pure functions of a generator."""

from __future__ import annotations

import math

import numpy as np

from frozen_fast.data.decode.types import TrainView

_CROP_ATTEMPTS = 10


def draw_train_view(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_probability: float,
) -> TrainView:
    """Draw one RandomResizedCrop box and one flip, for all frames of a clip.

    The box has a share of the area drawn uniformly from `scale` and an aspect ratio (width / height) drawn
    log-uniformly from `ratio`; after ten boxes that do not fit, the largest centred box whose ratio is allowed.
    This is torchvision's RandomResizedCrop (Szegedy et al., 2014), drawn from a NumPy generator.

    Args:
        rng: the clip's generator; always advanced by the same number of draws.
        height: upright source height, pixels.
        width: upright source width, pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect ratio.
        flip_probability: probability of a horizontal flip.
    """
    flip = bool(rng.random() < flip_probability)
    shares = rng.uniform(scale[0], scale[1], size=_CROP_ATTEMPTS)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), size=_CROP_ATTEMPTS))
    corner = rng.random(2)
    for share, aspect in zip(shares, ratios, strict=True):
        box_width = round(math.sqrt(share * height * width * aspect))
        box_height = round(math.sqrt(share * height * width / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(corner[0] * (height - box_height + 1))
            left = int(corner[1] * (width - box_width + 1))
            return TrainView(top, left, box_height, box_width, flip)
    return _centred_box(height, width, ratio, flip)


def _centred_box(height: int, width: int, ratio: tuple[float, float], flip: bool) -> TrainView:
    """The largest centred box whose aspect ratio lies within `ratio`."""
    box_height, box_width = height, width
    if width < ratio[0] * height:
        box_height = max(1, min(height, round(width / ratio[0])))
    elif width > ratio[1] * height:
        box_width = max(1, min(width, round(height * ratio[1])))
    return TrainView((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip)
