from __future__ import annotations

import numpy as np
import pytest

from frozen_fast.data.plan.frame_sampling import segment_starts, stride_in_frames, train_frames
from frozen_fast.data.plan.frame_sampling import test_windows as windows_of
from frozen_fast.errors import UserError

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 30, 31, 97]
FRAMES = [1, 2, 3, 4, 8]


def plain_segments(length: int, frames: int) -> list[list[int]]:
    """The frames of each segment, one frame at a time: a frame is in the segment that its first instant is in."""
    segments: list[list[int]] = [[] for _ in range(frames)]
    for frame in range(length):
        holder = [s for s in range(frames) if s * length // frames <= frame < (s + 1) * length // frames]
        segments[holder[0]].append(frame)
    return segments


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("frames", FRAMES)
def test_train_frames_draws_one_frame_inside_each_segment(length: int, frames: int) -> None:
    segments = plain_segments(length, frames)
    for seed in range(20):
        drawn = train_frames(length, frames, np.random.default_rng(seed))
        assert len(drawn) == frames
        assert drawn == sorted(drawn)
        if length >= frames:
            assert all(frame in segment for frame, segment in zip(drawn, segments, strict=True))
        else:
            assert set(drawn) == set(range(length))
            counts = np.bincount(drawn)
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("length", "frames"), [(1, 1), (3, 1), (8, 4), (9, 4), (11, 4), (17, 8)])
def test_train_frames_reach_every_frame_evenly(length: int, frames: int) -> None:
    rng = np.random.default_rng(0)
    draws = 3000
    counts = np.zeros(length)
    for _ in range(draws):
        counts[train_frames(length, frames, rng)] += 1
    starts = segment_starts(length, frames)
    for first, end in zip(starts[:-1], starts[1:], strict=True):
        expected = draws / (end - first)
        assert counts[first:end].sum() == draws
        assert np.abs(counts[first:end] - expected).max() < 5 * expected**0.5 + 1


def test_segments_are_equal_and_cover_the_clip() -> None:
    for length in range(1, 120):
        for frames in range(1, min(length, 12) + 1):
            starts = segment_starts(length, frames)
            sizes = np.diff(starts)
            assert starts[0] == 0 and starts[-1] == length
            assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 1


def test_train_frames_advance_the_generator_alike_for_every_length() -> None:
    after = []
    for length in (1, 3, 50):
        rng = np.random.default_rng(3)
        train_frames(length, 4, rng)
        after.append(rng.random())
    assert len(set(after)) == 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("stride", [1, 2, 5, 50])
def test_windows_hold_the_ith_frame_of_every_segment(length: int, frames: int, stride: int) -> None:
    windows = windows_of(length, frames, stride_frames=stride)
    if length < frames:
        assert len(windows) == 1 and set(windows[0]) == set(range(length)) and len(windows[0]) == frames
        return
    segments = plain_segments(length, frames)
    expected, i = [], 0
    while all(i < len(segment) for segment in segments):
        expected.append([segment[i] for segment in segments])
        i += stride
    assert windows == expected


def test_stride_zero_takes_the_middle_of_each_segment() -> None:
    assert windows_of(12, 4, stride_frames=0) == [[1, 4, 7, 10]]
    assert windows_of(9, 1, stride_frames=0) == [[4]]
    assert windows_of(1, 1, stride_frames=0) == [[0]]


def test_max_windows_are_evenly_spread() -> None:
    assert windows_of(100, 1, stride_frames=10, max_windows=1) == [[50]]
    assert windows_of(100, 1, stride_frames=10, max_windows=2) == [[20], [70]]
    assert windows_of(100, 1, stride_frames=10, max_windows=10) == windows_of(100, 1, stride_frames=10)
    assert windows_of(100, 1, stride_frames=10, max_windows=99) == windows_of(100, 1, stride_frames=10)
    for most in range(1, 10):
        offsets = [window[0] for window in windows_of(400, 4, stride_frames=3, max_windows=most)]
        assert len(set(offsets)) == most
        gaps = np.diff([-offsets[0], *offsets])[1:] if most > 1 else np.array([0])
        assert gaps.max() - gaps.min() <= 3 + offsets[0]


def test_stride_in_frames() -> None:
    assert stride_in_frames(2.0, 25.0) == 50
    assert stride_in_frames(2.0, 29.97) == 60
    assert stride_in_frames(0.5, 1.0) == 1
    assert stride_in_frames(0.01, 25.0) == 1
    assert stride_in_frames(0, 25.0) == 0
    with pytest.raises(UserError, match="stride_seconds: got -1"):
        stride_in_frames(-1, 25.0)


@pytest.mark.parametrize(("length", "frames"), [(0, 1), (5, 0), (-1, 2)])
def test_impossible_numbers_are_refused(length: int, frames: int) -> None:
    with pytest.raises(UserError, match="allowed: from 1"):
        train_frames(length, frames, np.random.default_rng(0))
    with pytest.raises(UserError, match="allowed: from 1"):
        windows_of(length, frames, stride_frames=1)
