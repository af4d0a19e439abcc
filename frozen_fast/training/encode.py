"""Encodes the clips and captions of an evaluation: each rank encodes its share, then all ranks exchange features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frozen_fast.common.progress import progress
from frozen_fast.data import BadClip, EvaluationLoader, Source
from frozen_fast.data.load.feature_loader import FeatureEvaluationLoader
from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import Features, RetrievalModel, TextInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.embedding_cache import Entry
from frozen_fast.training.clip_cache import ClipCache
from frozen_fast.training.signals import stop_explains

log = logging.getLogger(__name__)

AnyEvaluationLoader = EvaluationLoader | FeatureEvaluationLoader


@dataclass(frozen=True)
class EncodedClips:
    """The encoded clips of a source, the same on every rank.

    Attributes:
        features: index into source.clips -> features with first axis 1, merged over the clip's windows, fp32 on the
            CPU; clips that could not be read are left out.
        bad_clips: those clips, in order.
        num_windows: windows that were encoded.
    """

    features: dict[int, Features]
    bad_clips: list[BadClip]
    num_windows: int

    @property
    def kept(self) -> list[int]:
        """Indices of the clips, in the source's order: the rows of `stacked`."""
        return sorted(self.features)

    def stacked(self) -> Features:
        """The features of all clips, in the order of `kept`."""
        return stack_features([self.features[index] for index in self.kept])


def encode_clips(
    model: RetrievalModel,
    loader: AnyEvaluationLoader,
    parallel: Parallel,
    stop_asked: Callable[[], bool],
    cache: ClipCache | None = None,
) -> EncodedClips | None:
    """Encode the windows of every rank's clips and merge them per clip; every rank calls it.

    Args:
        model: in eval mode, on its device.
        loader: this rank's windows.
        parallel: ranks and autocast.
        stop_asked: returns whether this process was told to stop.
        cache: features of clips that were encoded before; new ones are added to it.

    Returns:
        The clips, or None when any rank was told to stop.

    Raises:
        UserError: a clip cannot be read under policy error; on every rank.
    """
    cached: dict[int, Entry] = {}
    with parallel.together():
        if cache is not None:
            cached = cache.find(list(loader.clip_indices))
            loader.clip_indices = [index for index in loader.clip_indices if index not in cached]
            log.info("embedding cache: %d clips found, %d to encode", len(cached), len(loader.clip_indices))
        windows = _encode_windows(model, loader, parallel, stop_asked)
    stopped, _ = parallel.agree(stop=stop_asked())
    if stopped:
        return None
    new: dict[int, Entry] = {
        index: (dict(model.merge_windows(parts)), len(parts))
        for index, parts in windows.items()
        if index not in loader.dropped
    }
    if cache is not None:
        with parallel.together():
            cache.add(new, clean=parallel.is_main)
    own = {**cached, **new}
    num_own = sum(count for _, count in cached.values()) + sum(map(len, windows.values()))
    features: dict[int, Features] = {}
    bad: dict[int, BadClip] = {}
    num_windows = 0
    for rank_clips, rank_bad, rank_windows in parallel.gather_objects((own, dict(loader.dropped), num_own)):
        assert not features.keys() & rank_clips.keys(), "a clip was encoded on two ranks"
        features.update({index: merged for index, (merged, _) in rank_clips.items()})
        bad.update(rank_bad)
        num_windows += rank_windows
    return EncodedClips(features, [bad[index] for index in sorted(bad)], num_windows)


def _encode_windows(
    model: RetrievalModel, loader: AnyEvaluationLoader, parallel: Parallel, stop_asked: Callable[[], bool]
) -> dict[int, list[Features]]:
    """Return the features of this rank's windows per clip, each with first axis 1, fp32 on the CPU."""
    windows: dict[int, list[Features]] = {}
    tell = progress("evaluate", len(loader.clip_indices), last_line=False) if parallel.is_main else None
    try:
        for batch in loader.batches():
            if stop_asked():
                break
            with parallel.autocast():
                features = on_cpu(model.video_features(batch.windows))
            read_before = len(windows)
            for row, index in enumerate(batch.clip_indices):
                windows.setdefault(index, []).append({name: x[row : row + 1] for name, x in features.items()})
            if tell is not None:
                tell(len(windows) - read_before, 0)
        if tell is not None:
            tell(0, len(loader.clip_indices) - len(windows))
    except Exception as error:
        if not stop_explains(error, stop_asked):
            raise
    finally:
        loader.close()
    return windows


def encode_texts(
    model: RetrievalModel,
    inputs: Callable[[Sequence[int]], TextInput],
    queries: Sequence[int],
    parallel: Parallel,
    batch_size: int,
) -> Features:
    """Encode some queries; features are fp32 on the CPU, and empty without queries."""
    parts = []
    tell = progress("evaluate", len(queries), unit="caption", last_line=False) if parallel.is_main else None
    for first in range(0, len(queries), batch_size):
        text = inputs(queries[first : first + batch_size])
        with parallel.autocast():
            parts.append(on_cpu(model.text_features(text)))
        if tell is not None:
            tell(min(batch_size, len(queries) - first), 0)
    return stack_features(parts)


def on_cpu(features: Features) -> Features:
    """Convert features to fp32 on the CPU."""
    return {name: tensor.float().cpu() for name, tensor in features.items()}


def stack_features(parts: Sequence[Features]) -> Features:
    """Concatenate the features of several captions or clips along their first axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def flat(features: Features) -> Tensor:
    """Return all features of a clip as one row."""
    return torch.cat([tensor.flatten(1) for tensor in features.values()], dim=1)


def class_numbers(source: Source, kept: Sequence[int], classes: Sequence[str], key: str = "source") -> list[int]:
    """Return the class of each clip as its index in a list of classes.

    Args:
        source: a source whose clips each have a class.
        kept: indices of the clips.
        classes: the known classes.
        key: the config key that defines them, for messages.

    Raises:
        UserError: a clip has no class, or an unknown one.
    """
    place = {name: number for number, name in enumerate(classes)}
    numbers = []
    for index in kept:
        clip = source.clips[index]
        if clip.label is None:
            raise UserError(
                f"source {source.name}: clip {clip.id!r} has no class; allowed: a class for all clips or for none"
            )
        if clip.label not in place:
            raise UserError(
                f"source {source.name}: clip {clip.id!r} has class {clip.label!r}; allowed: the {len(place)} classes "
                f"of {key}"
            )
        numbers.append(place[clip.label])
    return numbers
