"""Normalisation of uint8 pixels: as a buffer, and folded into the patch projection's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.models.clip.clip_towers import CLIP_SIZES
from frozen_fast.models.clip2video.clip2video_model import Clip2Video
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.video.blocks import PatchProjection
from frozen_fast.models.video.space_time import SpaceTimeTransformer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = VideoSize(resolution=32, patch=16, width=24, depth=2, heads=2)


def pixels_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_normalised_with_mean_and_std() -> None:
    video = pixels_of(2, 3, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.allclose(PixelNormalisation(MEAN, STD)(video), (video / 255 - mean) / std, atol=1e-5)


def test_the_buffer_is_not_saved_and_survives_casts_and_empty_memory() -> None:
    normalisation = PixelNormalisation(MEAN, STD)
    expected = normalisation.coefficients.clone()
    assert normalisation.state_dict() == {}
    assert torch.equal(normalisation.bfloat16().coefficients, expected)
    with torch.device("meta"):
        empty = nn.Sequential(PixelNormalisation(MEAN, STD))
    assert torch.equal(empty.to_empty(device="cpu")[0].coefficients, expected)
    with torch.device("meta"):
        model = Clip2Video(CLIP_SIZES["tiny"])
    assert model.to_empty(device="cpu").pixels.coefficients.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_projection_equals_the_plain_one_forward_and_backward(bias: bool) -> None:
    torch.manual_seed(0)
    projection, normalisation = PatchProjection(16, 24, bias).double(), PixelNormalisation(MEAN, STD)
    video = pixels_of(2, 3, 3, 32, 32)
    target = torch.randn(2, 3, 4, 24, dtype=torch.float64)
    scale_C, shift_C = (one.double() for one in normalisation.scale_and_shift())
    floats = torch.addcmul(shift_C[:, None, None], video.double(), scale_C[:, None, None])
    results = []
    for call in ((floats,), (video, normalisation)):
        out = projection(*call)
        assert out.dtype == torch.float64
        gradients = torch.autograd.grad((out * target).sum(), list(projection.parameters()))
        results.append((out, *gradients))
    for plain, folded in zip(*results, strict=True):
        assert torch.allclose(plain, folded, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_folding_loses_no_more_than_rounding_the_normalised_pixels() -> None:
    torch.manual_seed(0)
    projection, normalisation = PatchProjection(16, 64), PixelNormalisation(MEAN, STD)
    video = (pixels_of(4, 2, 3, 32, 32).float() * 0.5 + 40).byte()  # low contrast, away from 128
    exact = projection(normalisation(video))
    with torch.autocast("cpu", torch.bfloat16):
        plain, folded = projection(normalisation(video)), projection(video, normalisation)
    assert folded.dtype == torch.bfloat16
    errors = [(one.float() - exact).pow(2).mean().sqrt() for one in (folded, plain)]
    assert errors[0] <= 1.3 * errors[1]


def test_a_tower_takes_pixels_with_their_normalisation() -> None:
    torch.manual_seed(0)
    tower, normalisation = SpaceTimeTransformer(SIZE, 4, attention="reference"), PixelNormalisation(MEAN, STD)
    video = pixels_of(2, 4, 3, 32, 32)
    assert tower.folds_normalisation
    assert torch.allclose(tower(video, normalisation), tower(normalisation(video)), atol=1e-4)


def test_no_call_makes_a_tensor_of_python_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a tensor is a copy that waits for the device."""
    normalisation = PixelNormalisation(MEAN, STD)
    projection = PatchProjection(16, 24)

    def refused(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a tensor is built in a call")

    monkeypatch.setattr(torch, "tensor", refused)
    monkeypatch.setattr(torch, "as_tensor", refused)
    normalisation(pixels_of(1, 1, 3, 16, 16))
    projection(pixels_of(1, 1, 3, 16, 16), normalisation)
