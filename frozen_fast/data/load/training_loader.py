"""Turns planned batches into tensors: reads clips, replaces unreadable ones, and prefetches.

Axis letters: B clips, T frames, C channels (RGB), H and W pixels, L text tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig, SamplingConfig
from frozen_fast.data.decode import ClipError, Decoded, Decoder, DecodeRequest, VideoInfo
from frozen_fast.data.decode.threads import map_in_threads
from frozen_fast.data.load.bad_clips import BadClip
from frozen_fast.data.load.crops import finished, joined_videos, mapped, pinned, stacked
from frozen_fast.data.load.load_settings import load_settings
from frozen_fast.data.load.prefetch import Prefetcher, ThreadPrefetcher, WorkerPrefetcher, map_in_workers
from frozen_fast.data.load.reading import probe
from frozen_fast.data.load.transfer import CudaTransfer, Transfer
from frozen_fast.data.plan.frame_sampling import FixedRate, train_frames
from frozen_fast.data.plan.samplers import BatchSpec, SourceStream
from frozen_fast.data.plan.seeds import keyed_rng
from frozen_fast.data.plan.views import draw_train_view
from frozen_fast.data.sources import Clip, Source, twin_pairs
from frozen_fast.errors import UserError

T = TypeVar("T")
Policy = Literal["error", "skip"]
Tokenizer = Callable[[list[str]], dict[str, Tensor]]
Prober = Callable[..., VideoInfo]

MAX_ATTEMPTS = 20
PART_CLIPS = 8
"""Fewest clips of a part of a batch that a loader process reads."""
_START_SECONDS = 90.0  # a loader process starts, and its own time-out is found first
_DRAWS_FOR_A_NEW_CLIP = 100


@dataclass
class Batch:
    """The clips of one forward pass on one rank.

    Attributes:
        video: uint8 RGB, [B, T, 3, resolution, resolution]; for a model that reads several tensors per clip, a dict of
            tensors with first axis B: with padded short clips "video", and "frame_mask" [B, T], 1 on frames. Before
            `to`, crops that are resized on the device have the form of crops.stacked.
        text: the tokenizer's output, input_ids and attention_mask, [B, L] each.
        captions: the drawn captions.
        clip_ids: ids of the clips; a replacement has its own id.
        source: name of the source.
        frames: T; always 1 for pictures.
        bad_clips: unreadable clips and their replacements.
        backends: decoder backend -> number of clips.
        spec: the planned batch.
        caption_indices: of a feature store: which of its video's captions each is; None: all, end to end.
    """

    video: Tensor | dict[str, Tensor]
    text: dict[str, Tensor]
    captions: list[str]
    clip_ids: list[str]
    source: str
    frames: int
    bad_clips: list[BadClip]
    backends: Counter[str]
    spec: BatchSpec
    caption_indices: list[int | None] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory, so that copies to the device are asynchronous."""
        return replace(self, video=mapped(pinned, self.video), text=mapped(pinned, self.text))

    def to(self, device: torch.device, *, resolution: int | None = None) -> Batch:
        """Return a copy on a device; copies from page-locked memory are asynchronous.

        Args:
            device: the device.
            resolution: crops are resized on the device to resolution x resolution.
        """
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        return replace(self, video=finished(mapped(move, self.video), resolution), text=mapped(move, self.text))

    def tensors(self) -> list[Tensor]:
        """Those of video and text."""
        values = [self.video, self.text]
        return [one for value in values for one in (value.values() if isinstance(value, dict) else [value])]

    def parts(self, number: int) -> list[Batch]:
        """Itself cut along B into batches whose sizes differ by at most one; no more than one for each clip."""
        bounds = [len(self.clip_ids) * index // number for index in range(number + 1)]
        slices = [slice(first, last) for first, last in zip(bounds, bounds[1:], strict=False) if last > first]
        return [
            replace(
                self,
                video=mapped(lambda tensor: tensor[rows], self.video),  # noqa: B023  called at once
                text=mapped(lambda tensor: tensor[rows], self.text),  # noqa: B023
                captions=self.captions[rows],
                clip_ids=self.clip_ids[rows],
                caption_indices=self.caption_indices[rows],
            )
            for rows in slices
        ]

    @property
    def text_tokens(self) -> int:
        """L, tokens of the longest caption."""
        return next(iter(self.text.values())).shape[1]


def fixed_rate(sampling: SamplingConfig | None) -> FixedRate | None:
    """The rule of data.sampling, None for segments."""
    if sampling is None or sampling.rule == "segments":
        return None
    return FixedRate(sampling.frames_per_second, sampling.divisor)


def resolve_policy(decode: DecodeConfig, *, training: bool) -> Policy:
    """The policy for unreadable clips: "auto" is "skip" in training and "error" in evaluation."""
    if decode.on_bad_clip == "auto":
        return "skip" if training else "error"
    return decode.on_bad_clip


def probe_clip(clip: Clip, prober: Prober, max_pixels: int) -> tuple[VideoInfo, Sequence[int]]:
    """Properties of a clip's file, and the indices of the clip's frames in it, in order.

    Raises:
        ClipError: the file cannot be read, or the clip starts after the end of the file.
    """
    info = prober(clip.path, clip.kind, max_pixels=max_pixels)
    if clip.kind == "image":
        return info, range(1)
    length = float(info.presentation_seconds[-1]) + 1 / info.frames_per_second
    start = clip.segments[0][0] if clip.segments else clip.start_seconds
    if start is not None and start >= length:
        raise ClipError("no_frames", f"begins at {start:g} s of {length:g} s", clip.path)
    if not clip.segments:
        return info, range(*info.frame_range(clip.start_seconds, clip.end_seconds))
    inside = [info.frame_range(first, last) for first, last in clip.segments if first < length]
    return info, sorted({number for first, last in inside for number in range(first, last)})


@dataclass
class _Slot:
    """One position of a batch, until a readable clip fills it."""

    position: int
    clip: Clip
    attempt: int = 0
    caption: str = ""
    decoded: Decoded | None = None


@dataclass
class ClipReader:
    """Reads the clips of a BatchSpec; every random draw depends only on (seed, source, stream position, attempt).

    Attributes:
        sources: by name.
        decoder: this thread's or process's own.
        tokenizer: captions to tensors; None: the batch gets no text.
        augmentation: crop and flip.
        policy: skip or error, for unreadable clips.
        max_pixels: a larger frame is a bad clip.
        threads: files probed at the same time.
        prober: reads a file's frame count and size.
        rule: the frame sampling; None: one frame of each of T equal segments.
    """

    sources: Mapping[str, Source]
    decoder: Decoder
    tokenizer: Tokenizer | None
    augmentation: AugmentationConfig
    policy: Policy
    max_pixels: int
    threads: int = 1
    prober: Prober = probe
    rule: FixedRate | None = None
    _streams: dict[tuple[str, int, bool], SourceStream] = field(default_factory=dict, init=False, repr=False)

    def read(self, spec: BatchSpec) -> Batch:
        """Read a batch.

        Raises:
            UserError: a clip is unreadable with policy "error", or 20 replacements in a row are unreadable.
        """
        source = self.sources[spec.source]
        frames = 1 if source.kind == "image" else spec.frames
        slots = [
            _Slot(position, source.clips[index])
            for position, index in zip(spec.positions, spec.clip_indices, strict=True)
        ]
        bad_clips: list[BadClip] = []
        pending = slots
        while pending:
            failed = self._try(pending, source, spec, frames)
            bad_clips += [self._replace(slot, error, source, spec) for slot, error in failed]
            pending = [slot for slot, _ in failed]
        decoded = [slot.decoded for slot in slots if slot.decoded is not None]
        captions = [slot.caption for slot in slots]
        return Batch(
            video=stacked(decoded, None if self.rule is None else frames),
            text={} if self.tokenizer is None else self.tokenizer(captions),
            captions=captions,
            clip_ids=[slot.clip.id for slot in slots],
            source=source.name,
            frames=frames,
            bad_clips=bad_clips,
            backends=Counter(item.backend for item in decoded),
            spec=spec,
        )

    def _try(
        self, slots: Sequence[_Slot], source: Source, spec: BatchSpec, frames: int
    ) -> list[tuple[_Slot, ClipError]]:
        """Read each slot's clip; returns the slots that failed, with the errors."""
        prepare = partial(self._prepare, source=source, seed=spec.seed, frames=frames)
        requests = map_in_threads(prepare, slots, self.threads)
        failed, ready, asked = [], [], []
        for slot, request in zip(slots, requests, strict=True):
            if isinstance(request, ClipError):
                failed.append((slot, request))
            else:
                ready.append(slot)
                asked.append(request)
        outcomes = self.decoder.decode(asked) if asked else []
        for slot, outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, ClipError):
                failed.append((slot, outcome))
            else:
                slot.decoded = outcome
        return sorted(failed, key=lambda item: item[0].position)

    def _prepare(self, slot: _Slot, *, source: Source, seed: int, frames: int) -> DecodeRequest | ClipError:
        """All draws of one clip: caption, frames, view; always in this order."""
        clip = slot.clip
        rng = keyed_rng(seed, "clip", source.name, slot.position, slot.attempt)
        slot.caption = source.caption_rule.training(clip.captions, rng)
        try:
            info, numbers = probe_clip(clip, self.prober, self.max_pixels)
        except ClipError as error:
            return error
        if self.rule is None:
            chosen = train_frames(len(numbers), frames, rng)
        else:
            chosen = self.rule.train(len(numbers), info.frames_per_second, frames, rng)
        view = draw_train_view(
            rng,
            info.height,
            info.width,
            scale=self.augmentation.crop_scale,
            ratio=self.augmentation.crop_ratio,
            flip_probability=self.augmentation.horizontal_flip,
        )
        return DecodeRequest(clip.path, clip.kind, tuple(numbers[index] for index in chosen), view)

    def _replace(self, slot: _Slot, error: ClipError, source: Source, spec: BatchSpec) -> BadClip:
        """Give a slot another clip of the source, or raise by the policy or after too many attempts."""
        bad = slot.clip
        if self.policy == "error":
            raise UserError(unreadable(source.name, bad, error))
        slot.attempt += 1
        if slot.attempt >= MAX_ATTEMPTS:
            raise UserError(
                f"{unreadable(source.name, bad, error)}; it was the {MAX_ATTEMPTS}th clip in a row for one place of "
                "the batch; allowed: a source with mostly readable clips"
            )
        rng = keyed_rng(spec.seed, "replacement", source.name, slot.position, slot.attempt)
        index = int(rng.integers(len(source)))
        taken = self._batch_clips(spec, source)
        for _ in range(_DRAWS_FOR_A_NEW_CLIP if len(taken) < len(source) else 0):
            if index not in taken:
                break
            index = int(rng.integers(len(source)))
        slot.clip = source.clips[index]
        return BadClip(source.name, bad.id, bad.path, error.cause, error.message, slot.clip.id)

    def _batch_clips(self, spec: BatchSpec, source: Source) -> set[int]:
        """Indices of the clips of all ranks; worked out only for a bad clip, so that a spec stays small."""
        key = (spec.source, spec.seed, spec.twins_together)
        if key not in self._streams:
            pairs = twin_pairs(source) if spec.twins_together else None
            self._streams[key] = SourceStream(spec.source, len(source), spec.seed, pairs)
        return set(self._streams[key].clips(spec.batch_positions.start, len(spec.batch_positions)))

    def close(self) -> None:
        """Close the decoder."""
        self.decoder.close()


def unreadable(source: str, clip: Clip, error: ClipError) -> str:
    """One line that names the clip and why it cannot be read."""
    return f"clip {clip.id!r} of source {source!r} cannot be read: {clip.path}: {error.cause}: {error.message}"


@dataclass(frozen=True)
class _ReaderFactory:
    """Creates a ClipReader with its own decoder in the thread or process that calls it."""

    sources: Mapping[str, Source]
    decoder_factory: Callable[[], Decoder]
    tokenizer: Tokenizer | None
    augmentation: AugmentationConfig
    decode: DecodeConfig
    threads: int
    prober: Prober
    rule: FixedRate | None

    def reader(self) -> ClipReader:
        return ClipReader(
            self.sources,
            self.decoder_factory(),
            self.tokenizer,
            self.augmentation,
            resolve_policy(self.decode, training=True),
            self.decode.max_pixels,
            self.threads,
            self.prober,
            self.rule,
        )

    def __call__(self) -> Callable[[BatchSpec], Batch]:
        return self.reader().read


def parts_of(spec: BatchSpec, workers: int) -> list[BatchSpec]:
    """A batch in parts of 8 clips or more, at most one a worker: a slow file delays its part alone."""
    clips = len(spec.positions)
    count = max(1, min(workers, clips // PART_CLIPS))
    bounds = [clips * number // count for number in range(count + 1)]
    return [
        replace(spec, positions=spec.positions[first:last], clip_indices=spec.clip_indices[first:last])
        for first, last in pairwise(bounds)
    ]


def joined_batch(parts: Sequence[Batch], spec: BatchSpec, tokenizer: Tokenizer, *, pin: bool) -> Batch:
    """The parts of a batch as one.

    Args:
        parts: what was read for parts_of(spec).
        spec: of the batch.
        tokenizer: captions to tensors; all captions of a batch have the length of its longest.
        pin: tensors in page-locked memory.
    """
    captions = [caption for part in parts for caption in part.captions]
    text = tokenizer(captions)
    return replace(
        parts[0],
        video=joined_videos([part.video for part in parts], pin=pin) if pin or len(parts) > 1 else parts[0].video,
        text=mapped(pinned, text) if pin else text,
        captions=captions,
        clip_ids=[clip for part in parts for clip in part.clip_ids],
        bad_clips=[bad for part in parts for bad in part.bad_clips],
        backends=sum((part.backends for part in parts), Counter()),
        spec=spec,
    )


class TrainingLoader:
    """Turns planned batches into batches on the device; a thread or worker processes prefetch them."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        decoder_factory: Callable[[], Decoder],
        tokenizer: Tokenizer,
        *,
        augmentation: AugmentationConfig,
        decode: DecodeConfig,
        sampling: SamplingConfig | None = None,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
        prober: Prober = probe,
        transfer: Transfer[Batch] | None = None,
    ) -> None:
        """Set up a loader; batches() starts reading.

        Args:
            sources: by name.
            decoder_factory: creates a decoder for the training resolution; picklable if decode.workers is above 0.
            tokenizer: maps a list of captions to tensors.
            augmentation: crop and flip.
            decode: workers 0 reads in a background thread (DALI decodes on the device there), more read parts of
                batches in that many processes; load_settings fills in the defaults.
            sampling: which frames of a clip; None: one of each of T equal segments.
            device: where batches are delivered.
            resolution: side of the frames; required if crops are resized on the device.
            prober: reads a file's frame count and size.
            transfer: copies batches to the device; None: CudaTransfer for a CUDA device.
        """
        self._device = torch.device(device)
        self._settings = settings = load_settings(decode, self._device)
        rule = fixed_rate(sampling)
        own_tokenizer = None if settings.workers else tokenizer  # captions of all parts of a batch have one length
        self._factory = _ReaderFactory(
            sources, decoder_factory, own_tokenizer, augmentation, decode, settings.threads, prober, rule
        )
        self._tokenizer = tokenizer
        self._decode = decode
        self._resolution = resolution
        cuda = self._device.type == "cuda"
        self._transfer: Transfer[Batch] | None = CudaTransfer(self._device) if transfer is None and cuda else transfer
        self._pin = cuda
        self._workers: WorkerPrefetcher[Batch] | None = None
        self._prefetcher: Prefetcher[Any] | None = None
        self._describe: Callable[[], str] = lambda: "nothing"

    def batches(self, specs: Iterable[BatchSpec]) -> Iterator[Batch]:
        """Yield the batches of the specs in order; a new call ends the previous one.

        Raises:
            UserError: from the iterator, for an unreadable clip with policy "error", a batch that takes longer than
                decode.read_timeout_seconds, or a loader process that died. Other exceptions are raised
                unchanged.
        """
        self.close()
        awaited: deque[BatchSpec] = deque()
        self._describe = lambda: awaited[0].describe() if awaited else "the first batch"
        if self._settings.workers > 0:
            return self._delivered(self._from_workers(iter(specs), awaited), awaited, ahead=1)

        def noted() -> Iterator[BatchSpec]:
            for spec in specs:
                awaited.append(spec)
                yield spec

        read = partial(_read_all, self._factory, noted(), self._pin)
        return self._delivered(read, awaited, ahead=self._settings.prefetch_batches)

    def _from_workers(self, specs: Iterator[BatchSpec], awaited: deque[BatchSpec]) -> Callable[[], Iterator[Batch]]:
        """Start the loader processes; what to call for the batches that they read in parts."""
        workers, depth = self._settings.workers, self._settings.prefetch_batches
        first = next(specs, None)
        if first is not None and self._decode.prefetch_batches is not None:
            depth = self._decode.prefetch_batches * len(parts_of(first, workers))
        started: deque[BatchSpec] = deque()

        def noted() -> Iterator[BatchSpec]:
            for spec in chain([] if first is None else [first], specs):
                awaited.append(spec)
                started.append(spec)
                yield from parts_of(spec, workers)

        self._workers = parts = map_in_workers(
            self._factory,
            noted(),
            workers=workers,
            depth=depth,
            timeout_seconds=self._decode.read_timeout_seconds,
            describe=lambda: self._describe(),
        )

        def read() -> Iterator[Batch]:
            for part in parts:
                spec = started.popleft()
                rest = len(parts_of(spec, workers)) - 1
                read_parts = [part, *islice(parts, rest)]
                if len(read_parts) <= rest:
                    return  # closed meanwhile
                yield joined_batch(read_parts, spec, self._tokenizer, pin=self._pin)

        return read

    def _delivered(
        self, read: Callable[[], Iterator[Batch]], awaited: deque[BatchSpec], *, ahead: int
    ) -> Iterator[Batch]:
        """Batches on the device; loader processes read ahead by themselves, anything else does in a thread."""
        move = partial(Batch.to, device=self._device, resolution=self._resolution)
        transfer = self._transfer
        if transfer is not None:
            moved = transfer.received(self._in_thread(lambda: transfer.sent(read(), move), ahead))
        elif self._workers is not None:
            moved = map(move, read())
        else:
            moved = map(move, self._in_thread(read, ahead))
        return self._counted(moved, awaited, [self._workers, self._prefetcher])

    def _in_thread(self, make: Callable[[], Iterator[T]], ahead: int) -> ThreadPrefetcher[T]:
        timeout = self._decode.read_timeout_seconds + (_START_SECONDS if self._workers is not None else 0)
        prefetcher = ThreadPrefetcher(make, depth=ahead, timeout_seconds=timeout, describe=lambda: self._describe())
        self._prefetcher = prefetcher
        return prefetcher

    @staticmethod
    def _counted(
        batches: Iterator[Batch], awaited: deque[BatchSpec], prefetchers: Sequence[Prefetcher[Any] | None]
    ) -> Iterator[Batch]:
        try:
            for batch in batches:
                awaited.popleft()
                yield batch
        finally:
            for prefetcher in prefetchers:
                if prefetcher is not None:
                    prefetcher.close()

    def state(self) -> str:
        """The awaited batch and the state of the loader processes, in one line."""
        workers = [] if self._workers is None else self._workers.worker_states()
        return f"{self._describe()}; {', '.join(workers) or 'a background thread reads'}"

    def close(self) -> None:
        """Stop prefetching. Can be called more than once."""
        for one in (self._workers, self._prefetcher):
            if one is not None:
                one.close()
        self._workers = self._prefetcher = None


def _read_all(factory: _ReaderFactory, specs: Iterable[BatchSpec], pin: bool) -> Generator[Batch, None, None]:
    reader = factory.reader()
    try:
        for spec in specs:
            batch = reader.read(spec)
            yield batch.pin_memory() if pin else batch
    finally:
        reader.close()
