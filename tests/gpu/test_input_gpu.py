"""Input on a GPU: resize of crops, folded normalisation, and copies on the side stream under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from frozen_fast.data.decode import TrainView
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.load.crops import finished, mapped, stacked
from frozen_fast.data.load.prefetch import ThreadPrefetcher
from frozen_fast.data.load.transfer import CudaTransfer
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.video.blocks import PatchProjection

pytestmark = pytest.mark.gpu
RESOLUTION = 224


def test_crops_resized_on_the_gpu_equal_the_cpus_within_one_level() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 256, 340, 3), dtype=np.uint8)
    views = []
    for _ in range(32):
        height, width = int(rng.integers(32, 257)), int(rng.integers(32, 341))
        top, left = int(rng.integers(0, 257 - height)), int(rng.integers(0, 341 - width))
        views.append(TrainView(top, left, height, width, bool(rng.integers(2))))
    later, whole = ViewTransform(RESOLUTION, crops_only=True), ViewTransform(RESOLUTION)
    crops = mapped(Tensor.cuda, stacked([later(frames, view, "x") for view in views], None))
    got = finished(crops, RESOLUTION)
    assert isinstance(got, Tensor) and got.is_cuda and got.dtype == torch.uint8
    expected = torch.stack([whole(frames, view, "x").frames_TCHW for view in views])
    assert (got.cpu().int() - expected.int()).abs().max() <= 1


def test_the_folded_patch_projection_is_as_exact_as_the_plain_one_in_bf16() -> None:
    torch.manual_seed(0)
    projection, normalisation = PatchProjection(16, 768).cuda(), PixelNormalisation((0.485,) * 3, (0.229,) * 3).cuda()
    video = torch.randint(0, 256, (4, 2, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, device="cuda")
    exact = projection.double()(normalisation(video).double())
    projection.float()
    with torch.autocast("cuda", torch.bfloat16):
        folded, plain = projection(video, normalisation), projection(normalisation(video))
    errors = [(one.double() - exact).pow(2).mean().sqrt().item() for one in (folded, plain)]
    assert errors[0] <= 1.3 * errors[1]


def test_normalising_uint8_clips_does_not_wait_for_the_device() -> None:
    projection, normalisation = PatchProjection(16, 64).cuda(), PixelNormalisation((0.5,) * 3, (0.2,) * 3).cuda()
    video = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8, device="cuda")
    projection(video, normalisation)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        projection(video, normalisation)
        normalisation(video)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Numbered:
    """A batch whose pixels all have its number."""

    number: int
    video: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.video]


def test_batches_copied_ahead_are_whole_while_the_compute_stream_is_busy() -> None:
    """Page-locked buffers and device memory are reused all the time; no batch may see another one's pixels."""
    device = torch.device("cuda")
    transfer = CudaTransfer(device)
    threads: set[str] = set()

    def batches() -> Iterator[Numbered]:
        for number in range(60):
            threads.add(threading.current_thread().name)
            pixels = torch.full((16, 1, 3, RESOLUTION, RESOLUTION), number, dtype=torch.uint8).pin_memory()
            yield Numbered(number, pixels)

    def move(batch: Numbered) -> Numbered:
        return replace(batch, video=batch.video.to(device, non_blocking=True))

    prefetcher = ThreadPrefetcher(
        lambda: transfer.sent(batches(), move), depth=2, timeout_seconds=60, describe=lambda: "a batch"
    )
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for batch in transfer.received(prefetcher):
        torch.cuda._sleep(2_000_000)  # the compute stream lags behind the copies
        wrong += (batch.video != batch.number).sum()
        del batch
    assert wrong.item() == 0
    assert threads == {"frozen_fast loader"}, "the consumer's thread does not copy"
