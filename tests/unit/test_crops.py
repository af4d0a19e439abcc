"""Pixels stay uint8 up to the model: bytes that travel, resize on the device, parts of batches, copies ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig
from frozen_fast.data.decode import DecodeRequest, TestView, TrainView
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.load.crops import CROPS, FLIPS, SIZES, finished, joined, joined_videos, resize_crops, stacked
from frozen_fast.data.load.for_model import FrameFormat, decoder_factory
from frozen_fast.data.load.training_loader import Batch, ClipReader, TrainingLoader, parts_of
from frozen_fast.data.plan.samplers import BatchSpec, DataPosition, plan_steps
from frozen_fast.data.sources import CaptionRule, Clip, PackedClips, Source
from support import packing
from support.fake_decoding import FakeDecoder, fake_probe, fake_tokenizer

RESOLUTION = 40


def specs_of(source: Source, *, batch: int, frames: int, steps: int) -> list[BatchSpec]:
    sizes, weights = {source.name: len(source)}, {source.name: 1.0}
    start = DataPosition()
    planned = plan_steps(
        sizes, weights, "round_robin", 0, batch_sizes={source.name: batch}, frames=frames, num_steps=steps, start=start
    )
    return list(planned)


def fake_source(count: int, slow: int | None = None) -> Source:
    names = [f"/x/c{number}{'slow' if number == slow else ''}.mp4" for number in range(count)]
    clips = [Clip(f"c{number}", name, (f"one {'x' * (number % 7)}",)) for number, name in enumerate(names)]
    return Source("web", "manifest", PackedClips(clips), "video", CaptionRule())


def frames_of(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


VIEWS = [
    TrainView(0, 0, 60, 80, False),
    TrainView(3, 7, 31, 52, True),
    TrainView(5, 1, 40, 40, True),
    TrainView(0, 0, 17, 23, False),
    TrainView(20, 9, 1, 3, True),
]


def test_the_resize_on_the_device_equals_that_of_the_cpu_within_one_level() -> None:
    whole, later = ViewTransform(RESOLUTION), ViewTransform(RESOLUTION, crops_only=True)
    clips = [frames_of(seed, 3, 60, 80) for seed in range(len(VIEWS))]
    expected = torch.stack([whole(clip, view, "x").frames_TCHW for clip, view in zip(clips, VIEWS, strict=True)])
    views = [view for view in VIEWS if view.height * view.width <= 2 * RESOLUTION**2]
    assert len(views) == len(VIEWS) - 1, "the first is large and resized at once"
    batch = stacked([later(clip, view, "x") for clip, view in zip(clips, VIEWS, strict=True)], None)
    assert isinstance(batch, dict) and batch[CROPS].dtype == torch.uint8
    got = finished(batch, RESOLUTION)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.uint8 and got.shape == expected.shape
    assert (got.int() - expected.int()).abs().max() <= 1
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("size", [(256, 340), (200, 150), (64, 48)])
def test_random_boxes_agree_at_the_models_resolution(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    frames = frames_of(1, 1, *size)
    whole, later = ViewTransform(112), ViewTransform(112, crops_only=True)
    for _ in range(12):
        height, width = (int(rng.integers(1, side + 1)) for side in size)
        top, left = (
            int(rng.integers(0, side - length + 1)) for side, length in zip(size, (height, width), strict=True)
        )
        view = TrainView(top, left, height, width, bool(rng.integers(2)))
        got = finished(stacked([later(frames, view, "x")], None), 112)
        assert isinstance(got, torch.Tensor)
        assert (got[0].int() - whole(frames, view, "x").frames_TCHW.int()).abs().max() <= 1


def test_what_lies_beyond_a_crop_is_not_read() -> None:
    crops = torch.randint(0, 256, (2, 1, 20, 30, 3), dtype=torch.uint8)
    sizes, flips = torch.tensor([[12, 17], [20, 30]]), torch.tensor([False, True])
    first = resize_crops(crops, sizes, flips, 24)
    crops[0, :, 12:], crops[0, :, :, 17:] = 255, 0
    assert torch.equal(resize_crops(crops, sizes, flips, 24), first)


def test_test_views_are_finished_where_they_are_decoded() -> None:
    decoded = ViewTransform(RESOLUTION, crops_only=True)(frames_of(0, 2, 60, 80), TestView(48), "x")
    assert decoded.flip is None and decoded.frames_TCHW.shape == (2, 3, RESOLUTION, RESOLUTION)


def test_short_clips_are_padded_with_a_mask_in_either_form() -> None:
    later = ViewTransform(RESOLUTION, crops_only=True)
    crops = [later(frames_of(n, n + 1, 60, 80), VIEWS[1], "x") for n in range(2)]
    whole = [ViewTransform(RESOLUTION)(frames_of(n, n + 1, 60, 80), VIEWS[1], "x") for n in range(2)]
    for clips in (crops, whole):
        batch = finished(stacked(clips, 3), RESOLUTION)
        assert isinstance(batch, dict) and batch["frame_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]
        assert batch["video"].shape == (2, 3, 3, RESOLUTION, RESOLUTION)
        assert (batch["video"][0, 1:] == 0).all() and batch["video"][1, 1].any()


def test_parts_of_a_batch_join_to_what_the_whole_is() -> None:
    later = ViewTransform(RESOLUTION, crops_only=True)
    clips = [later(frames_of(n, 2, 60, 80), view, "x") for n, view in enumerate(VIEWS[1:])]
    parts = [stacked(clips[:1], None), stacked(clips[1:], None)]
    both = finished(joined_videos(parts), RESOLUTION)
    assert torch.equal(both, finished(stacked(clips, None), RESOLUTION))  # type: ignore[arg-type]
    assert joined([torch.ones(1, 2), torch.zeros(2, 3)]).shape == (3, 3)


# Bytes


def video_bytes(batch: Batch) -> int:
    return sum(one.nbytes for one in (batch.video.values() if isinstance(batch.video, dict) else [batch.video]))


@pytest.mark.parametrize("resize", ["cpu", "device"])
def test_bytes_of_a_clip_on_their_way_to_the_device(tmp_path: Path, resize: str) -> None:
    """A quarter of float32 where the resize comes first; the crops' own bytes where it comes last."""
    packing.pack(packing.source_of(packing.manifest(tmp_path, 6)), tmp_path / "packed")
    source = packing.source_of(tmp_path / "packed")
    frames, resolution = 2, packing.RESOLUTION
    decode = DecodeConfig(resize=resize)  # type: ignore[arg-type]
    make = decoder_factory(decode, FrameFormat(resolution, (0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
    reader = ClipReader({source.name: source}, make(), fake_tokenizer, AugmentationConfig(), "error", 10**7)
    (spec,) = specs_of(source, batch=4, frames=frames, steps=1)
    batch = reader.read(spec)
    as_floats = 4 * frames * 3 * resolution**2 * 4
    if resize == "cpu":
        assert isinstance(batch.video, torch.Tensor) and 4 * video_bytes(batch) == as_floats
    else:
        assert isinstance(batch.video, dict)
        height, width = (int(length) for length in batch.video[SIZES].amax(0))
        assert batch.video[CROPS].shape == (4, frames, height, width, 3)
        own = 4 * frames * height * width * 3
        assert video_bytes(batch) == own + batch.video[SIZES].nbytes + batch.video[FLIPS].nbytes
    moved = batch.to(torch.device("cpu"), resolution=resolution)
    assert isinstance(moved.video, torch.Tensor) and 4 * moved.video.nbytes == as_floats
    reader.close()


# Parts of batches, read by loader processes


@pytest.mark.parametrize(("clips", "workers", "counts"), [(7, 4, [7]), (16, 4, [8, 8]), (33, 3, [11, 11, 11])])
def test_a_batch_is_read_in_parts_of_eight_clips_or_more(clips: int, workers: int, counts: list[int]) -> None:
    (spec,) = specs_of(fake_source(clips), batch=clips, frames=1, steps=1)
    parts = parts_of(spec, workers)
    assert [len(part.positions) for part in parts] == counts
    assert sum((part.clip_indices for part in parts), ()) == spec.clip_indices
    assert all(part.batch_positions == spec.batch_positions for part in parts), (
        "a replacement avoids the whole batch's clips"
    )


class SlowDecoder(FakeDecoder):
    """Notes in a file when each clip is decoded; the slow one takes three seconds."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def _one(self, request: DecodeRequest) -> Any:
        if "slow" in str(request.path):
            time.sleep(3)
        with open(self.notes, "a") as file:
            file.write(f"{request.path}\n")
        return super()._one(request)


def loader_of(source: Source, decoder: Callable[[], FakeDecoder] = FakeDecoder, **fields: Any) -> TrainingLoader:
    transfer = fields.pop("transfer", None)
    return TrainingLoader(
        {source.name: source},
        decoder,
        fake_tokenizer,
        augmentation=AugmentationConfig(),
        decode=DecodeConfig(**fields),
        prober=fake_probe,
        transfer=transfer,
    )


def test_one_slow_file_does_not_delay_the_other_parts(tmp_path: Path) -> None:
    source = fake_source(64, slow=5)
    specs = specs_of(source, batch=32, frames=2, steps=2)
    notes = tmp_path / "decoded"
    loader = loader_of(source, partial(SlowDecoder, notes), workers=2)
    whole = loader_of(source, workers=0)
    try:
        got = list(loader.batches(specs))
        expected = list(whole.batches(specs))
    finally:
        loader.close()
        whole.close()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.video, other.video) and one.captions == other.captions and one.spec == other.spec  # type: ignore[arg-type]
        assert torch.equal(one.text["input_ids"], other.text["input_ids"]), "one length for all parts"
        assert one.clip_ids == other.clip_ids and one.backends == other.backends
    order = notes.read_text().splitlines()
    assert len(order) == 64
    slow = next(number for number, name in enumerate(order) if "slow" in name)
    assert slow >= 24, "the other process went on with its parts meanwhile"


# Copies ahead


class FakeTransfer:
    """Notes what CudaTransfer would queue."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def sent(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Any:
        for number, batch in enumerate(batches):
            self.events.append(f"sent {number}")
            yield move(batch), None

    def received(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, (batch, _) in enumerate(batches):
            self.events.append(f"received {number}")
            yield batch


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_sent_ahead_of_the_step_that_needs_them(workers: int) -> None:
    source = fake_source(40)
    transfer = FakeTransfer()
    loader = loader_of(source, workers=workers, prefetch_batches=2, transfer=transfer)
    batches = loader.batches(specs_of(source, batch=8, frames=1, steps=5))
    first = next(batches)
    deadline = time.monotonic() + 60
    while "sent 1" not in transfer.events and time.monotonic() < deadline:
        time.sleep(0.01)
    assert transfer.events.index("sent 1") > transfer.events.index("sent 0") and "received 1" not in transfer.events
    rest = list(batches)
    assert [first.spec.step, *(batch.spec.step for batch in rest)] == [1, 2, 3, 4, 5]
    assert [event for event in transfer.events if event.startswith("received")] == [f"received {n}" for n in range(5)]
    loader.close()


def test_an_error_of_the_reading_side_comes_through_a_transfer() -> None:
    source = fake_source(40)
    clips = [Clip("c0", "/x/crash.mp4", ("one",)), *(source.clips[n] for n in range(1, 40))]
    broken = Source("web", "manifest", PackedClips(clips), "video", CaptionRule())
    loader = loader_of(broken, workers=1, transfer=FakeTransfer())
    with pytest.raises(ZeroDivisionError, match="a defect of the decoder"):
        list(loader.batches(specs_of(broken, batch=8, frames=1, steps=5)))
    loader.close()
