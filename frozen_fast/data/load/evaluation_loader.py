"""Test windows of a source's clips, each clip on exactly one rank.

Axis letters: N windows, T frames, C channels (RGB), H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frozen_fast.config.schema import DecodeConfig, SamplingConfig
from frozen_fast.data.decode import ClipError, Decoded, Decoder, DecodeRequest, TestView
from frozen_fast.data.decode.threads import map_in_threads
from frozen_fast.data.load.bad_clips import BadClip
from frozen_fast.data.load.crops import mapped, pinned, stacked
from frozen_fast.data.load.load_settings import load_settings
from frozen_fast.data.load.prefetch import Prefetcher, ThreadPrefetcher, stream_from_workers
from frozen_fast.data.load.reading import probe
from frozen_fast.data.load.training_loader import (
    Policy,
    Prober,
    fixed_rate,
    probe_clip,
    resolve_policy,
    unreadable,
)
from frozen_fast.data.plan.frame_sampling import FixedRate, Segments, stride_in_frames, test_windows
from frozen_fast.data.sources import Clip, Source
from frozen_fast.errors import UserError

_PROBED_AT_ONCE = 16
CROPS: dict[int, tuple[Literal["begin", "centre", "end"], ...]] = {1: ("centre",), 3: ("begin", "centre", "end")}
"""evaluation.crops -> where the crops lie along the longer side."""


@dataclass
class EvaluationBatch:
    """A batch of windows; the windows of one clip may span batches.

    Attributes:
        windows: uint8 RGB [N, T, 3, H, W], N at most the batch size; with padded short clips a dict of
            "video" and "frame_mask" [N, T].
        clip_indices: the clip of each window, as an index into source.clips.
        clip_windows: for each window, the number of windows of its clip, each crop counted.
    """

    windows: Tensor | dict[str, Tensor]
    clip_indices: list[int]
    clip_windows: list[int]

    def pin_memory(self) -> EvaluationBatch:
        """Return a copy in page-locked memory."""
        return replace(self, windows=mapped(pinned, self.windows))

    def to(self, device: torch.device) -> EvaluationBatch:
        """Return a copy on a device; copies from page-locked memory are asynchronous."""
        return replace(self, windows=mapped(partial(Tensor.to, device=device, non_blocking=True), self.windows))


@dataclass(frozen=True)
class _Dropped:
    """An unreadable clip, passed along with the batches."""

    index: int
    bad_clip: BadClip


@dataclass(frozen=True)
class _Piece:
    """Windows of one clip that are decoded together, in one view; clip_windows: windows x crops of the whole clip."""

    index: int
    clip: Clip
    windows: list[list[int]]
    clip_windows: int
    view: TestView

    def request(self) -> DecodeRequest:
        return DecodeRequest(self.clip.path, self.clip.kind, self._frames(), self.view)

    def unpack(self, frames_FCHW: Tensor) -> list[Tensor]:
        """The decoded frames as windows of [T, 3, H, W]."""
        place = {frame: number for number, frame in enumerate(self._frames())}
        return [frames_FCHW[[place[frame] for frame in window]] for window in self.windows]

    def _frames(self) -> tuple[int, ...]:
        return tuple(sorted({frame for window in self.windows for frame in window}))


class _Window(NamedTuple):
    """One decoded window; clip is an index into source.clips, clip_windows the number of windows of the clip."""

    clip: int
    clip_windows: int
    decoded: Decoded


@dataclass(frozen=True)
class _WindowReader:
    """Reads windows of clips; runs in a thread or a worker process."""

    source: Source
    decoder_factory: Callable[[], Decoder]
    prober: Prober
    policy: Policy
    max_pixels: int
    threads: int
    frames: int
    stride_seconds: float
    max_windows: int
    batch_size: int
    views: tuple[TestView, ...]
    pin: bool
    rule: FixedRate | None
    segments: Segments | None

    def of_worker(self, indices: Sequence[int], worker: int, workers: int) -> Iterator[EvaluationBatch | _Dropped]:
        """This worker's share of a rank's clips."""
        return self.read(indices[worker::workers])

    def read(self, indices: Sequence[int]) -> Generator[EvaluationBatch | _Dropped, None, None]:
        """Yield batches of at most batch_size windows, and unreadable clips."""
        decoder = self.decoder_factory()
        ready: deque[_Window] = deque()
        try:
            for pieces in self._groups(self._pieces(indices)):
                if isinstance(pieces, _Dropped):
                    yield pieces
                    continue
                outcomes = decoder.decode([piece.request() for piece in pieces])
                for piece, outcome in zip(pieces, outcomes, strict=True):
                    if isinstance(outcome, ClipError):
                        yield self._dropped(piece.index, piece.clip, outcome)
                    else:
                        ready += self._windows(piece, outcome)
                while len(ready) >= self.batch_size:
                    yield self._batch(ready)
            while ready:
                yield self._batch(ready)
        finally:
            decoder.close()

    def _windows(self, piece: _Piece, decoded: Decoded) -> list[_Window]:
        unpacked = piece.unpack(decoded.frames_TCHW)
        return [_Window(piece.index, piece.clip_windows, replace(decoded, frames_TCHW=frames)) for frames in unpacked]

    def _batch(self, ready: deque[_Window]) -> EvaluationBatch:
        taken = [ready.popleft() for _ in range(min(self.batch_size, len(ready)))]
        batch = EvaluationBatch(
            stacked([window.decoded for window in taken], None if self.rule is None else self._num_frames),
            [window.clip for window in taken],
            [window.clip_windows for window in taken],
        )
        return batch.pin_memory() if self.pin else batch

    def _groups(self, pieces: Iterator[_Piece | _Dropped]) -> Iterator[list[_Piece] | _Dropped]:
        """Pieces of a batch or more of windows, and less than two batches."""
        group: list[_Piece] = []
        for piece in pieces:
            if isinstance(piece, _Dropped):
                yield piece
                continue
            group.append(piece)
            if sum(len(held.windows) for held in group) >= self.batch_size:
                yield group
                group = []
        if group:
            yield group

    def _pieces(self, indices: Sequence[int]) -> Iterator[_Piece | _Dropped]:
        """Each clip's windows, at most batch_size of them in a piece: a long clip is decoded in parts."""
        remaining = iter(indices)
        while block := list(islice(remaining, _PROBED_AT_ONCE)):
            for index, outcome in zip(block, map_in_threads(self._plan, block, self.threads), strict=True):
                if isinstance(outcome, ClipError):
                    yield self._dropped(index, self.source.clips[index], outcome)
                    continue
                clip, windows = outcome
                for view in self.views:
                    for first in range(0, len(windows), self.batch_size):
                        part = windows[first : first + self.batch_size]
                        yield _Piece(index, clip, part, len(windows) * len(self.views), view)

    def _plan(self, index: int) -> tuple[Clip, list[list[int]]] | ClipError:
        """The windows of one clip, as frame indices into its file."""
        clip = self.source.clips[index]
        try:
            info, numbers = probe_clip(clip, self.prober, self.max_pixels)
        except ClipError as error:
            return error
        frames = self._num_frames
        if self.segments is not None:
            windows = self.segments.windows(len(numbers), info.frames_per_second, frames)
            return clip, [[numbers[frame] for frame in window] for window in windows]
        if self.rule is not None:
            window = self.rule.test(len(numbers), info.frames_per_second, frames)
            return clip, [[numbers[frame] for frame in window]]
        stride = stride_in_frames(self.stride_seconds, info.frames_per_second)
        windows = test_windows(len(numbers), frames, stride_frames=stride, max_windows=self.max_windows)
        return clip, [[numbers[frame] for frame in window] for window in windows]

    @property
    def _num_frames(self) -> int:
        return 1 if self.source.kind == "image" else self.frames

    def _dropped(self, index: int, clip: Clip, error: ClipError) -> _Dropped:
        if self.policy == "error":
            why = unreadable(self.source.name, clip, error)
            raise UserError(f"{why}; allowed: data.decode.on_bad_clip=skip excludes it")
        return _Dropped(index, BadClip(self.source.name, clip.id, clip.path, error.cause, error.message))


class EvaluationLoader:
    """The test windows of this rank's clips: those of index rank, rank + world_size, and so on.

    Attributes:
        clip_indices: the clips that batches() reads; a caller may remove some before.
        dropped: clip index -> reason, for this rank's unreadable clips so far with policy "skip". A clip may fail
            after some of its windows were delivered, so exclude dropped clips after the last batch.
    """

    def __init__(
        self,
        source: Source,
        decoder_factory: Callable[[], Decoder],
        *,
        decode: DecodeConfig,
        frames: int,
        stride_seconds: float,
        max_windows: int,
        batch_size: int,
        resize: int,
        crops: int = 1,
        sampling: SamplingConfig | None = None,
        segments: Segments | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prober: Prober = probe,
    ) -> None:
        """Set up a loader; batches() starts reading.

        Args:
            source: the source.
            decoder_factory: creates a decoder; must be picklable if decode.workers is above 0.
            decode: as for training; on_bad_clip "auto" means "error" here.
            frames: frames of a window (pictures: 1).
            stride_seconds: distance of windows inside a segment; 0: one window in the middle.
            max_windows: largest number of windows per clip, 0: all.
            batch_size: windows of a batch.
            resize: short side before the crop.
            crops: views of each window: 1, the centre crop, or 3, with the crops at both ends of the longer side.
            sampling: which frames of a clip; None: windows over T equal segments. fixed_rate gives one window per
                clip and ignores stride_seconds.
            segments: one window per segment of a clip, in order of time; ignores stride_seconds and max_windows.
                None: windows over the whole clip.
            rank: this process.
            world_size: number of processes.
            device: where batches are delivered.
            prober: reads a file's frame count and size.
        """
        if batch_size < 1:
            raise UserError(f"evaluation.batch_size: got {batch_size}; allowed: from 1")
        self.dropped: dict[int, BadClip] = {}
        self.clip_indices: Sequence[int] = range(rank, len(source), world_size)
        self._source = source
        self._decode = decode
        self._device = torch.device(device)
        self._settings = settings = load_settings(decode, self._device)
        self._prefetcher: Prefetcher[EvaluationBatch | _Dropped] | None = None
        self._reader = _WindowReader(
            source,
            decoder_factory,
            prober,
            resolve_policy(decode, training=False),
            decode.max_pixels,
            settings.threads,
            frames,
            stride_seconds,
            max_windows,
            batch_size,
            tuple(TestView(resize, place) for place in CROPS[crops]),
            self._device.type == "cuda",
            fixed_rate(sampling),
            segments,
        )

    def batches(self) -> Iterator[EvaluationBatch]:
        """Yield all windows of this rank's clips; with decode.workers above 0 the order differs from the source's.

        Raises:
            UserError: from the iterator, as for TrainingLoader.batches.
        """
        self.close()
        self.dropped.clear()
        decode, settings = self._decode, self._settings

        def describe() -> str:
            return f"evaluation windows of source {self._source.name!r}"

        if settings.workers > 0:
            reader = replace(self._reader, pin=False)
            self._prefetcher = stream_from_workers(
                partial(reader.of_worker, self.clip_indices),
                workers=settings.workers,
                depth=settings.prefetch_batches,
                timeout_seconds=decode.read_timeout_seconds,
                describe=describe,
                pin_memory=self._reader.pin,
            )
        else:
            self._prefetcher = ThreadPrefetcher(
                partial(self._reader.read, self.clip_indices),
                depth=settings.prefetch_batches,
                timeout_seconds=decode.read_timeout_seconds,
                describe=describe,
            )
        return self._delivered(self._prefetcher)

    def _delivered(self, prefetcher: Prefetcher[EvaluationBatch | _Dropped]) -> Iterator[EvaluationBatch]:
        try:
            for item in prefetcher:
                if isinstance(item, _Dropped):
                    self.dropped[item.index] = item.bad_clip
                else:
                    yield item.to(self._device)
        finally:
            prefetcher.close()

    def close(self) -> None:
        """Stop prefetching. Can be called more than once."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
