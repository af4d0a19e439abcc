"""Batches of expert features and caption tokens from a feature store.

Axis letters: B videos, Q captions, L tokens, N vectors of one video's expert, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from frozen_fast.data.features.feature_pickle import ArrayInFile, open_feature_pickle
from frozen_fast.data.features.feature_store import FeatureStore
from frozen_fast.data.load.bad_clips import BadClip
from frozen_fast.data.load.prefetch import Prefetcher, ThreadPrefetcher
from frozen_fast.data.load.training_loader import Batch
from frozen_fast.data.plan.samplers import BatchSpec
from frozen_fast.data.plan.seeds import keyed_rng
from frozen_fast.data.sources import Source
from frozen_fast.errors import UserError

TOKENS = "tokens"
BACKEND = "features"

QueryInputs = Callable[[Sequence[int]], dict[str, Tensor]]
"""Indices of an evaluation's queries -> the model's text input for them."""

Caption = tuple[str, int | None]
"""A video's id and the index of one of its captions in the store; None: all its captions, end to end."""


class ExpertFormat(NamedTuple):
    """The features of an expert that a model reads.

    Attributes:
        width: of one vector; 0: any.
        vectors: largest number of vectors per video, padded with zeros; 0: one vector per video.
    """

    width: int
    vectors: int = 0


@dataclass(frozen=True, kw_only=True)
class FeatureFormat:
    """The features of a store that a model reads.

    Attributes:
        experts: by name.
        text: name of the text features; empty: the store has only one.
        text_width: of a token; 0: any.
        text_tokens: captions are truncated or padded to this many tokens.
        other_texts: additional text features of the same captions, for teachers; in a batch "tokens/NAME".
        caption_masks: video -> the indices of the captions that training may draw; None: all.
    """

    experts: Mapping[str, ExpertFormat]
    text: str
    text_tokens: int
    text_width: int = 0
    other_texts: tuple[str, ...] = ()
    caption_masks: Mapping[str, Sequence[int]] | None = None


@dataclass
class FeatureReader:
    """Reads videos and captions of one source's store."""

    source: Source
    format: FeatureFormat
    store: FeatureStore = field(init=False)

    def __post_init__(self) -> None:
        """Open the store and check that it has the features that the model reads."""
        self.store = FeatureStore(self.source.clips[0].path)
        for name, (width, vectors) in self.format.experts.items():
            self.store.expert(name)
            stored, kind = self.store.experts[name].width, self.store.experts[name].kind
            if width not in (0, stored):
                raise UserError(f"model.experts.experts: got {name} of width {width}; allowed: {stored}, as stored")
            if (kind == "set") != (vectors > 0):
                allowed = "clusters above 0" if kind == "set" else "clusters 0"
                got = f"got {name}, of which {self.source.name} has a {kind} per video"
                raise UserError(f"model.experts.experts: {got}; allowed: {allowed}")
        self.store.text(self.text)
        stored = self.store.texts[self.text].width
        if self.format.text_width not in (0, stored):
            got = f"got {self.format.text_width}, but {self.text} has {stored}"
            raise UserError(f"model.experts.text_width: {got}; allowed: {stored}")
        for name in self.format.other_texts:
            self.store.text(name)

    @cached_property
    def text(self) -> str:
        """The text features' name."""
        return self.store.text_name(self.format.text)

    @cached_property
    def chosen(self) -> dict[str, int]:
        """Video -> its evaluation caption, for videos whose split selects one."""
        split = self.store.split(self.source.clips[0].split)
        pairs = zip(split.videos, split.captions, strict=True)
        return {video: index for video, index in pairs if index is not None}

    def videos(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Expert features of some of the source's videos: [B, D], or [B, N, D] padded with zeros; NaN if missing."""
        ids = [self.source.clips[index].id for index in indices]
        rows = np.array([self.store.rows[video] for video in ids])
        found = {}
        for name, (_, vectors) in self.format.experts.items():
            arrays, width = self.store.expert(name), self.store.experts[name].width
            here = arrays["available"][rows] != 0
            if not vectors:
                x_BD = np.full((len(rows), width), np.nan, dtype=np.float32)
                x_BD[here] = arrays["vectors"][arrays["ends"][rows[here]]]
                found[name] = torch.from_numpy(x_BD)
                continue
            x_BND = np.zeros((len(rows), vectors, width), dtype=np.float32)
            x_BND[~here] = np.nan
            for place in np.flatnonzero(here):
                first, last = arrays["ends"][rows[place]], arrays["ends"][rows[place] + 1]
                last = min(last, first + vectors)
                x_BND[place, : last - first] = arrays["vectors"][first:last]
            found[name] = torch.from_numpy(x_BND)
        return found

    def tokens(self, captions: Sequence[Caption]) -> dict[str, Tensor]:
        """Token features of some captions: "tokens" [Q, L, D], and "tokens/NAME" for the other texts."""
        names = {TOKENS: self.text, **{f"{TOKENS}/{name}": name for name in self.format.other_texts}}
        found = {}
        for key, name in names.items():
            x_QLD = np.zeros((len(captions), self.format.text_tokens, self.store.texts[name].width), dtype=np.float32)
            for place, (video, index) in enumerate(captions):
                own = self.store.caption_tokens(name, video)
                vectors = np.concatenate(own) if index is None else own[index]
                vectors = vectors[: self.format.text_tokens]
                x_QLD[place, : len(vectors)] = vectors
            found[key] = torch.from_numpy(x_QLD)
        return found

    def draw(self, index: int, rng: np.random.Generator) -> Caption:
        """The caption of one training step by the source's rule: drawn uniformly, the first, or all."""
        clip = self.source.clips[index]
        mode = self.source.caption_rule.mode
        if mode in ("paragraph", "all"):
            return clip.id, None
        if clip.id in self.chosen:
            return clip.id, self.chosen[clip.id]
        if self.format.caption_masks is not None and clip.id in self.format.caption_masks:
            allowed: Sequence[int] = self.format.caption_masks[clip.id]
        else:
            allowed = range(len(clip.captions))
        return clip.id, int(allowed[0] if mode == "first" else allowed[int(rng.integers(len(allowed)))])

    def queries(self, video_of_query: Sequence[int], protocol: str) -> list[Caption]:
        """The captions of an evaluation's queries, ordered by video and caption."""
        seen: Counter[int] = Counter()
        found: list[Caption] = []
        for index in video_of_query:
            video = self.source.clips[index].id
            if protocol == "paragraph":
                found.append((video, None))
            else:
                found.append((video, self.chosen.get(video, seen[index])))
                seen[index] += 1
        return found


class FeatureTrainingLoader:
    """Turns planned batches into batches of features on the device; a thread prefetches them."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        format: FeatureFormat,
        *,
        caption_masks: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        prefetch_batches: int = 2,
        timeout_seconds: float = 120.0,
    ) -> None:
        """Open the sources' stores.

        Args:
            sources: by name.
            format: the features to read.
            caption_masks: source name -> denoising masks (read_caption_masks).
            device: where batches are delivered.
            prefetch_batches: number of batches to prefetch.
            timeout_seconds: a batch that takes longer is an error.

        Raises:
            UserError: a store lacks a feature that the model reads.
        """
        masks = {name: read_caption_masks(path) for name, path in (caption_masks or {}).items()}
        self._readers = {
            name: FeatureReader(source, replace(format, caption_masks=masks.get(name)))
            for name, source in sources.items()
        }
        self._device = torch.device(device)
        self._depth, self._timeout = prefetch_batches, timeout_seconds
        self._prefetcher: Prefetcher[Batch] | None = None

    def read(self, spec: BatchSpec) -> Batch:
        """One batch, on the CPU; the caption drawn is a function of seed, source and stream position."""
        reader = self._readers[spec.source]
        source = reader.source
        captions = [
            reader.draw(index, keyed_rng(spec.seed, "caption", spec.source, position))
            for position, index in zip(spec.positions, spec.clip_indices, strict=True)
        ]
        texts = []
        for video, index in captions:
            own = reader.store.captions[video]
            texts.append(" ".join(own) if index is None else own[index])
        return Batch(
            video=reader.videos(spec.clip_indices),
            text=reader.tokens(captions),
            captions=texts,
            clip_ids=[source.clips[index].id for index in spec.clip_indices],
            source=source.name,
            frames=1,
            bad_clips=[],
            backends=Counter({BACKEND: len(captions)}),
            spec=spec,
            caption_indices=[index for _, index in captions],
        )

    def batches(self, specs: Iterable[BatchSpec]) -> Iterator[Batch]:
        """Yield the batches of the specs in order; a new call ends the previous one."""
        self.close()
        pin = self._device.type == "cuda"
        self._prefetcher = ThreadPrefetcher(
            partial(self._read_all, specs, pin),
            depth=self._depth,
            timeout_seconds=self._timeout,
            describe=lambda: "a batch of features",
        )
        try:
            for batch in self._prefetcher:
                yield batch.to(self._device)
        finally:
            self.close()

    def _read_all(self, specs: Iterable[BatchSpec], pin: bool) -> Generator[Batch, None, None]:
        for spec in specs:
            batch = self.read(spec)
            yield batch.pin_memory() if pin else batch

    def state(self) -> str:
        """State of the loader in one line, for reports of hangs."""
        return "features are read from a mapped file, in this process"

    def close(self) -> None:
        """Stop prefetching. Can be called more than once."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


@dataclass(frozen=True)
class FeatureWindows:
    """A batch of videos of an evaluation; clip_indices: indices into source.clips."""

    windows: dict[str, Tensor]
    clip_indices: list[int]


class FeatureEvaluationLoader:
    """The features of this rank's videos, those of index rank, rank + world_size and so on; one window each.

    Attributes:
        dropped: always empty: a store has no unreadable videos.
    """

    def __init__(
        self,
        source: Source,
        format: FeatureFormat,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the source's store; batch_size: videos of a batch.

        Raises:
            UserError: the store lacks a feature that the model reads.
        """
        self.dropped: dict[int, BadClip] = {}
        self.clip_indices: Sequence[int] = range(rank, len(source), world_size)
        self._reader = FeatureReader(source, format)
        self._batch_size, self._device = batch_size, torch.device(device)

    def batches(self) -> Iterator[FeatureWindows]:
        """All of this rank's videos."""
        for first in range(0, len(self.clip_indices), self._batch_size):
            indices = list(self.clip_indices[first : first + self._batch_size])
            video = {name: x.to(self._device) for name, x in self._reader.videos(indices).items()}
            yield FeatureWindows(video, indices)

    def query_inputs(self, video_of_query: Sequence[int], protocol: str) -> QueryInputs:
        """Return a function for the model's text input of an evaluation's queries.

        Args:
            video_of_query: the index in the source of each query's video.
            protocol: the evaluation's: "paragraph" joins a video's captions.

        Returns:
            indices of queries -> their token features.
        """
        captions = self._reader.queries(video_of_query, protocol)
        return lambda queries: self._reader.tokens([captions[query] for query in queries])

    def close(self) -> None:
        """Do nothing: this loader does not prefetch."""


def read_caption_masks(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Denoising masks: {video: 0 or 1 per caption} -> the indices of the captions that count.

    Raises:
        UserError: no such file, or a video without a caption left.
    """
    found = {}
    for video, mask in open_feature_pickle(Path(path).expanduser()).items():
        values: Any = mask.read().tolist() if isinstance(mask, ArrayInFile) else mask
        kept = tuple(index for index, value in enumerate(values) if value)
        if not kept:
            raise UserError(f"caption_masks: {path} leaves no caption of {video}; allowed: at least one")
        found[video] = kept
    return found
