"""Frame sampling: pure functions of the number of frames and a generator.

A clip of L frames is divided into T segments whose lengths differ by at most one frame. Training draws one frame of
each segment; evaluation takes the i-th frame of each segment, for i = 0, stride, 2 * stride and so on (Bain et al.,
"Frozen in Time", 2021, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frozen_fast.errors import UserError


def train_frames(num_available: int, num_frames: int, rng: np.random.Generator) -> list[int]:
    """Draw one frame uniformly from each of num_frames equal segments.

    Every frame from 0 to num_available - 1 lies in a segment and can be drawn. A clip with fewer frames than
    asked for repeats frames in order, each at least once, without randomness.

    Args:
        num_available: frames of the clip, L, at least 1.
        num_frames: frames wanted, T, at least 1.
        rng: advanced by T draws for any L.

    Returns:
        T frame indices in non-decreasing order.
    """
    _check(num_available, num_frames)
    draws = rng.random(num_frames)
    if num_available < num_frames:
        return _repeated(num_available, num_frames)
    starts = segment_starts(num_available, num_frames)
    return [
        first + min(int(draw * (end - first)), end - first - 1)
        for draw, first, end in zip(draws.tolist(), starts[:-1], starts[1:], strict=True)
    ]


def test_windows(num_available: int, num_frames: int, *, stride_frames: int, max_windows: int = 0) -> list[list[int]]:
    """The windows whose embeddings are averaged in evaluation.

    Window i holds the i-th frame of every segment, i = 0, stride_frames, 2 * stride_frames .. below the length of
    the shortest segment, so that all windows have num_frames frames.

    Args:
        num_available: frames of the clip, L, at least 1.
        num_frames: frames of a window, T, at least 1.
        stride_frames: distance of the windows inside a segment; 0: one window, the middle frame of each segment.
        max_windows: largest number of windows, evenly spread; 0: all.

    Returns:
        Windows of T indices each; a clip with fewer frames than T gives one window that repeats frames.
    """
    _check(num_available, num_frames)
    if stride_frames < 0 or max_windows < 0:
        raise UserError(f"stride_frames, max_windows: got {stride_frames}, {max_windows}; allowed: from 0")
    if num_available < num_frames:
        return [_repeated(num_available, num_frames)]
    starts = segment_starts(num_available, num_frames)
    if stride_frames == 0:
        return [[(first + end - 1) // 2 for first, end in zip(starts[:-1], starts[1:], strict=True)]]
    offsets = list(range(0, num_available // num_frames, stride_frames))
    if 0 < max_windows < len(offsets):
        offsets = [offsets[(2 * k + 1) * len(offsets) // (2 * max_windows)] for k in range(max_windows)]
    return [[first + offset for first in starts[:-1]] for offset in offsets]


test_windows.__test__ = False  # type: ignore[attr-defined]  # not a test, despite its name


@dataclass(frozen=True)
class FixedRate:
    """CLIP2Video's sampling: evenly spaced frames of those at a fixed rate. A short clip gives fewer frames.

    Attributes:
        frames_per_second: rate of the list of frames (5 in the released code, which reads extracted pictures).
        divisor: keep 1 / divisor of the list, evenly spaced (2 on MSR-VTT, 1 on MSVD and VATEX).
    """

    frames_per_second: float
    divisor: int

    def train(
        self, num_available: int, clip_frames_per_second: float, num_frames: int, rng: np.random.Generator
    ) -> list[int]:
        """Evenly spaced frames; frames between the first and the last are shifted by up to half their distance.

        They are shifted only if half the distance, in listed frames, is more than 2.

        Args:
            num_available: frames of the clip, L, at least 1.
            clip_frames_per_second: rate of the clip's own frames.
            num_frames: most frames wanted, T, at least 1.
            rng: advanced if frames are shifted.

        Returns:
            At most T frame indices in non-decreasing order.
        """
        listed = self._listed(num_available, clip_frames_per_second)
        places = _evenly(len(listed), num_frames)
        half = int(places[1] - places[0]) // 2 if 2 < num_frames <= len(listed) else 0
        if len(listed) > num_frames and half > 2:
            places[1:-1] += rng.integers(-half, half, size=num_frames - 2)
        return [listed[place] for place in places.tolist()]

    def test(self, num_available: int, clip_frames_per_second: float, num_frames: int) -> list[int]:
        """Evenly spaced frames: as `train`, without shifts."""
        listed = self._listed(num_available, clip_frames_per_second)
        return [listed[place] for place in _evenly(len(listed), num_frames).tolist()]

    def _listed(self, num_available: int, clip_frames_per_second: float) -> list[int]:
        """The candidate frames: at the fixed rate, reduced by the divisor, at least one."""
        step = clip_frames_per_second / self.frames_per_second
        count = max(1, round(num_available / step))
        kept = np.linspace(0, count - 1, num=max(1, count // self.divisor), dtype=int)
        return [min(int(index * step), num_available - 1) for index in kept.tolist()]


@dataclass(frozen=True)
class Segments:
    """Windows of feature extraction: a clip is cut into equal segments, and each segment is one window.

    Attributes:
        seconds: length of a segment, to the nearest number of segments that fit; 0: the clip is one segment.
        most: largest number of segments of a clip, evenly spread; 0: all.
    """

    seconds: float
    most: int = 0

    def windows(self, num_available: int, clip_frames_per_second: float, num_frames: int) -> list[list[int]]:
        """The middle frames of num_frames equal parts of each segment, segment after segment.

        Args:
            num_available: frames of the clip, L, at least 1.
            clip_frames_per_second: rate of the clip's own frames.
            num_frames: frames of a window, T, at least 1; a segment of fewer frames repeats them.

        Returns:
            Windows of T indices each, in order of time.
        """
        _check(num_available, num_frames)
        frames = self.seconds * clip_frames_per_second
        count = min(max(1, round(num_available / frames)), num_available) if frames else 1
        starts = segment_starts(num_available, count)
        most = self.most or count
        kept = [(2 * k + 1) * count // (2 * most) for k in range(most)] if most < count else range(count)
        found = []
        for segment in kept:
            first, end = starts[segment], starts[segment + 1]
            (window,) = test_windows(end - first, num_frames, stride_frames=0)
            found.append([first + frame for frame in window])
        return found


def _evenly(available: int, wanted: int) -> np.ndarray:
    """At most `wanted` places among `available`, first and last included."""
    return np.linspace(0, available - 1, num=min(available, wanted), dtype=int)


def stride_in_frames(stride_seconds: float, frames_per_second: float) -> int:
    """Convert a stride in seconds to frames, rounded, at least 1; 0 stays 0 (one window in the middle)."""
    if stride_seconds < 0:
        raise UserError(f"evaluation.stride_seconds: got {stride_seconds}; allowed: from 0")
    return max(1, int(stride_seconds * frames_per_second + 0.5)) if stride_seconds else 0


def segment_starts(num_available: int, num_frames: int) -> list[int]:
    """The first frame of each segment, and num_available at the end."""
    return [index * num_available // num_frames for index in range(num_frames + 1)]


def _repeated(num_available: int, num_frames: int) -> list[int]:
    """All frames of a short clip, in order, repeated as evenly as possible up to num_frames."""
    return [(2 * index + 1) * num_available // (2 * num_frames) for index in range(num_frames)]


def _check(num_available: int, num_frames: int) -> None:
    if num_available < 1 or num_frames < 1:
        raise UserError(f"frames: got {num_frames} of a clip of {num_available}; allowed: from 1")
