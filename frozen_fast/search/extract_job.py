"""A source into one expert of a feature store, on any number of processes, in parts that survive a kill.

Rank 0 lists the source. What the store holds of the expert, and the parts of an extraction that was killed, are kept;
the rest is dealt out over the ranks. Each rank writes parts: Arrow files of clips and vectors. When all are done, rank
0 writes the expert's file in the order of the store's videos, then store.json.

Axis letters: N vectors of one clip, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from frozen_fast.common.files import write_atomically
from frozen_fast.data import BadClip, Clip
from frozen_fast.data.features.feature_store import (
    STORE_FILE,
    ExpertKind,
    FeatureStore,
    Split,
    StoredFeature,
    write_contents,
    write_expert,
    write_store,
)
from frozen_fast.errors import UserError, some
from frozen_fast.search.embed_job import VECTOR, finished_parts
from frozen_fast.search.row_table import Row, file_of, mark_file, read_table

log = logging.getLogger(__name__)

KEY = "key"
WORK_FOLDER = "work"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Names of experts and texts: each is a file."""


@dataclass(frozen=True)
class Extraction:
    """The work of an extraction for one expert, planned on rank 0.

    Attributes:
        folder: the store's.
        name: the expert's.
        origin: the network and the settings, as the store keeps them.
        captions: the store's videos in row order, with their captions.
        splits: of a new store; none where there is one.
        store: the store that is there.
        keys: id of a clip of the source -> what decides its vectors.
        kept: ids whose vectors the store holds.
        todo: clips without vectors, in the source's order.
        bad_clips: clips whose file is missing.
    """

    folder: Path
    name: str
    origin: dict[str, Any]
    captions: Mapping[str, Sequence[str]]
    splits: list[Split]
    store: FeatureStore | None
    keys: dict[str, str]
    kept: set[str]
    todo: list[Clip]
    bad_clips: list[BadClip]

    @property
    def work(self) -> Path:
        """Where parts go."""
        return self.folder / WORK_FOLDER / self.name


@dataclass(frozen=True)
class ExtractSummary:
    """Result of an extraction.

    Attributes:
        feature: the expert as the store holds it.
        videos: of the store.
        extracted: clips whose vectors were computed.
        kept: clips whose vectors were there already.
        bad_clips: clips that could not be read.
    """

    feature: StoredFeature
    videos: int
    extracted: int
    kept: int
    bad_clips: list[BadClip]


def check_name(option: str, name: str) -> None:
    """Refuse a name that cannot be a file's.

    Raises:
        UserError: naming the option.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{option}: got {name!r}; allowed: letters, digits, dots, - and _, no dot first")


def plan_extraction(
    folder: Path, name: str, origin: dict[str, Any], clips: Sequence[Clip], source: str, *, fresh: bool
) -> Extraction:
    """Find out which clips need vectors.

    Args:
        folder: the store's; may hold a store, and parts of an extraction that was killed.
        name: the expert's.
        origin: the network and the settings, as plain values.
        clips: what the source holds.
        source: its format, for messages.
        fresh: forget what the store and the parts hold of the expert.

    Raises:
        UserError: an id twice, clips that the store lacks, or an expert of that name from elsewhere.
    """
    origin = json.loads(json.dumps(origin))
    own = {clip.id: clip.captions for clip in clips}
    if twice := [video for video, count in Counter(clip.id for clip in clips).items() if count > 1]:
        raise UserError(f"--source: got {some(twice)} more than once; allowed: an id for each clip")
    store = FeatureStore(folder) if (folder / STORE_FILE).exists() else None
    if store is not None and (foreign := [video for video in own if video not in store.rows]):
        raise UserError(f"--source: got {some(foreign)}, which {folder} lacks; allowed: its videos, another --output")
    work = folder / WORK_FOLDER / name
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    parts = finished_parts(work, {"origin": origin})
    known = {key for path in parts for key in read_table(path)[KEY].to_pylist()}
    kept = set() if fresh or store is None else _kept(store, name, origin) & own.keys()
    bad: list[BadClip] = []
    keys: dict[str, str] = {}
    mark = lru_cache(maxsize=1024)(mark_file)  # many clips of one shard follow one another
    for clip in clips:
        try:
            keys[clip.id] = clip_key(clip, mark(file_of(clip.path)))
        except OSError as error:
            bad.append(BadClip(source, clip.id, clip.path, "missing", error.strerror or str(error)))
    todo = [clip for clip in clips if clip.id in keys and clip.id not in kept and keys[clip.id] not in known]
    captions: Mapping[str, Sequence[str]] = own if store is None else store.captions
    splits = _splits(clips) if store is None else []
    log.info("extract: %d clips, %d of them are extracted already", len(clips), len(clips) - len(todo) - len(bad))
    return Extraction(folder, name, origin, captions, splits, store, keys, kept, todo, bad)


def _kept(store: FeatureStore, name: str, origin: dict[str, Any]) -> set[str]:
    """Ids whose vectors a store holds.

    Raises:
        UserError: the store's expert of that name came from elsewhere.
    """
    if name not in store.experts:
        return set()
    found = store.experts[name].origin
    if found != origin:
        differ = ["released features"] if found is None else [key for key in origin if found.get(key) != origin[key]]
        got = f"got {name!r}, which the store contains with other {some(differ)}"
        raise UserError(f"--expert: {got}; allowed: another name, or --fresh")
    available = store.expert(name)["available"]
    return {video for video, row in store.rows.items() if available[row]}


def _splits(clips: Sequence[Clip]) -> list[Split]:
    """The splits that clips name."""
    videos: dict[str, list[str]] = {}
    for clip in clips:
        if clip.split:
            videos.setdefault(clip.split, []).append(clip.id)
    return [Split(name, tuple(ids), (None,) * len(ids)) for name, ids in videos.items()]


def clip_key(clip: Clip, mark: tuple[Any, ...]) -> str:
    """What decides a clip's vectors: its file as it is now, and its part of it."""
    told = [clip.id, clip.path, clip.kind, clip.start_seconds, clip.end_seconds, clip.segments, mark]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def features_table(rows: Sequence[Row], vectors: Sequence[np.ndarray]) -> pa.Table:
    """A part: clips' keys and their [N, D] vectors, end to end."""
    ends = np.cumsum([0, *(value.size for value in vectors)], dtype=np.int64)
    flat = np.concatenate([value.ravel() for value in vectors]).astype(np.float32)
    column = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat))
    return pa.table({KEY: [row[KEY] for row in rows], VECTOR: column})


def finish_extraction(job: Extraction, kind: ExpertKind, width: int, bad_clips: Sequence[BadClip]) -> ExtractSummary:
    """Write the expert's file from the parts and from what the store holds, then store.json; remove the parts.

    Args:
        job: as plan_extraction gave it.
        kind: one vector per video, or sets.
        width: D.
        bad_clips: of all ranks and of the listing.

    Raises:
        UserError: no clip has vectors.
    """
    parts = {path: read_table(path) for path in finished_parts(job.work, {"origin": job.origin})}
    place_of = {key: (path, row) for path, part in parts.items() for row, key in enumerate(part[KEY].to_pylist())}
    places = {video: place_of[key] for video, key in job.keys.items() if key in place_of and video not in job.kept}
    if not places and not job.kept:
        raise UserError(
            f"--source: got {len(bad_clips)} clips, none of them readable; allowed: at least one readable clip"
        )
    held = job.store.expert(job.name) if job.kept and job.store is not None else {}
    lists = {path: part[VECTOR].combine_chunks() for path, part in parts.items()}

    def vectors_of(video: str) -> np.ndarray | None:
        """[N, D], a view of a mapped file; None: the video has none."""
        if video in places:
            path, row = places[video]
            first, last = lists[path].offsets[row].as_py(), lists[path].offsets[row + 1].as_py()
            return lists[path].values.slice(first, last - first).to_numpy().reshape(-1, width)
        if video in job.kept:
            assert job.store is not None
            row = job.store.rows[video]
            return held["vectors"][held["ends"][row] : held["ends"][row + 1]]
        return None

    def stream() -> Iterator[np.ndarray]:
        for video in job.captions:
            if (value := vectors_of(video)) is not None:
                yield value

    found = (vectors_of(video) for video in job.captions)
    lengths = [None if value is None else len(value) for value in found]
    written = write_expert(job.folder, job.name, kind, width, lengths, stream)
    feature = StoredFeature(**{**asdict(written), "origin": job.origin})
    _add_to_store(job, feature)
    listed = "".join(json.dumps(asdict(bad)) + "\n" for bad in bad_clips)
    write_atomically(bad_clips_file(job.folder, job.name), listed)
    shutil.rmtree(job.work)
    bad = {clip.clip_id for clip in bad_clips}
    extracted = sum(clip.id not in bad for clip in job.todo)
    kept = len(places) + len(job.kept) - extracted
    return ExtractSummary(feature, len(job.captions), extracted, kept, list(bad_clips))


def _add_to_store(job: Extraction, feature: StoredFeature) -> None:
    if job.store is None:
        write_store(job.folder, job.captions, [feature], [], job.splits)
        return
    experts = {**job.store.experts, job.name: feature}
    write_contents(job.folder, len(job.captions), experts.values(), job.store.texts.values())


def bad_clips_file(folder: Path, name: str) -> Path:
    """Where an expert's unreadable clips are listed."""
    return folder / "experts" / f"{name}.bad_clips.jsonl"
