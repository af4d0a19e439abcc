"""CLIP2Video's choice of frames, and the padding and masks of short clips in both loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig, SamplingConfig
from frozen_fast.data.decode import Decoded
from frozen_fast.data.load.evaluation_loader import EvaluationLoader
from frozen_fast.data.load.training_loader import TrainingLoader, stacked
from frozen_fast.data.plan.frame_sampling import FixedRate
from frozen_fast.data.plan.samplers import DataPosition, plan_steps
from frozen_fast.data.sources import Clip, PackedClips, Source
from support.fake_decoding import RATE, FakeDecoder, fake_probe, fake_tokenizer


def test_frames_at_the_clips_own_rate_are_evenly_spaced() -> None:
    assert FixedRate(5.0, 1).test(12, 5.0, 12) == list(range(12))
    assert FixedRate(5.0, 1).test(23, 5.0, 12) == list(range(0, 23, 2))
    assert FixedRate(5.0, 1).test(100, 5.0, 3) == [0, 49, 99]


def test_the_rate_and_the_divisor_thin_the_list() -> None:
    """250 frames at 25 per second are 50 at 5, every fifth; divided by 2 they are 25 of these 50."""
    at_five = FixedRate(5.0, 1).test(250, 25.0, 50)
    assert at_five == list(range(0, 250, 5))
    halved = FixedRate(5.0, 2).test(250, 25.0, 50)
    assert halved == [at_five[place] for place in np.linspace(0, 49, 25, dtype=int)]
    assert len(FixedRate(5.0, 2).test(250, 25.0, 12)) == 12


@pytest.mark.parametrize(("frames", "listed"), [(1, 1), (30, 3), (110, 11), (4, 1)])
def test_short_clips_give_fewer_frames(frames: int, listed: int) -> None:
    rule = FixedRate(5.0, 2)
    assert len(rule.test(frames, 25.0, 12)) == listed
    assert rule.train(frames, 25.0, 12, np.random.default_rng(0)) == rule.test(frames, 25.0, 12)


def test_training_moves_inner_frames_by_up_to_half_their_distance() -> None:
    rule, rng = FixedRate(5.0, 1), np.random.default_rng(0)
    rest = np.array(rule.test(121, 5.0, 13))
    half = 5
    moves = np.array([rule.train(121, 5.0, 13, rng) for _ in range(400)]) - rest
    assert (moves[:, 0] == 0).all() and (moves[:, -1] == 0).all()
    assert moves[:, 1:-1].min() == -half and moves[:, 1:-1].max() == half - 1
    for _ in range(50):
        drawn = rule.train(121, 5.0, 13, rng)
        assert drawn == sorted(drawn)


def test_close_frames_are_not_moved() -> None:
    """Half the distance must be more than 2."""
    rule, rng = FixedRate(5.0, 1), np.random.default_rng(0)
    assert rule.train(61, 5.0, 13, rng) == rule.test(61, 5.0, 13)
    assert rule.train(73, 5.0, 13, rng) != rule.test(73, 5.0, 13)


def test_one_and_two_frames_are_never_moved() -> None:
    rule, rng = FixedRate(5.0, 1), np.random.default_rng(0)
    for frames in (1, 2):
        assert rule.train(500, 5.0, frames, rng) == rule.test(500, 5.0, frames)


def source() -> Source:
    names = ("a", "b_short", "c_long", "d")
    return Source("s", "manifest", PackedClips([Clip(name, f"/x/{name}.mp4", (name,)) for name in names]), "video")


SAMPLING = SamplingConfig(rule="fixed_rate", frames_per_second=5.0)


def check(video: torch.Tensor, mask: torch.Tensor, path: str) -> None:
    """20 frames at 10 per second are 10 listed, 2 are 1, 200 are 100."""
    info = fake_probe(path, "video", max_pixels=1)
    expected = FixedRate(5.0, 1).test(info.num_frames, RATE, 12)
    assert mask.tolist() == [1.0] * len(expected) + [0.0] * (12 - len(expected))
    if "long" not in path:
        assert video[: len(expected), 1, 0, 0].tolist() == expected
    assert not video[len(expected) :].any()


def test_the_training_loader_pads_and_masks() -> None:
    data = source()
    loader = TrainingLoader(
        {"s": data},
        FakeDecoder,
        fake_tokenizer,
        augmentation=AugmentationConfig(),
        decode=DecodeConfig(),
        sampling=SAMPLING,
        prober=fake_probe,
    )
    specs = plan_steps(
        {"s": 4}, {"s": 1.0}, "round_robin", 0, batch_sizes={"s": 4}, frames=12, num_steps=1, start=DataPosition()
    )
    (batch,) = loader.batches(specs)
    assert isinstance(batch.video, dict) and batch.video["video"].shape[:2] == (4, 12)
    assert sorted(batch.clip_ids) == ["a", "b_short", "c_long", "d"]
    for name, video, mask in zip(batch.clip_ids, batch.video["video"], batch.video["frame_mask"], strict=True):
        check(video, mask, f"/x/{name}.mp4")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_evaluation_loader_pads_and_masks(workers: int) -> None:
    data = source()
    loader = EvaluationLoader(
        data,
        FakeDecoder,
        decode=DecodeConfig(workers=workers, backend="pyav"),
        frames=12,
        stride_seconds=0.2,
        max_windows=0,
        batch_size=3,
        resize=256,
        sampling=SAMPLING,
        prober=fake_probe,
    )
    seen = []
    for batch in loader.batches():
        assert isinstance(batch.windows, dict) and set(batch.clip_windows) == {1}
        for index, video, mask in zip(
            batch.clip_indices, batch.windows["video"], batch.windows["frame_mask"], strict=True
        ):
            seen.append(index)
            check(video, mask, data.clips[index].path)
    assert sorted(seen) == [0, 1, 2, 3]


def test_clips_of_one_length_are_stacked_as_they_are() -> None:
    clips = [torch.rand(3, 3, 2, 2) for _ in range(2)]
    whole = stacked([Decoded(clip, "pyav") for clip in clips], None)
    assert isinstance(whole, torch.Tensor) and torch.equal(whole, torch.stack(clips))
