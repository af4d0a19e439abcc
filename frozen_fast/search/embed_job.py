"""Embeds a source into an index on any number of processes, in parts, so that a killed job can continue.

Rank 0 lists the source. What an index of the same folder, or the parts of an embedding that was killed, already holds
is taken from there; the rest is dealt out over the ranks. Each rank writes parts: Arrow files of rows and vectors. When
all are done, rank 0 adds them to the index, in the source's order, and removes what the source no longer holds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.config.schema import DecodeConfig
from frozen_fast.data import BadClip, Source
from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.search.checkpoint_settings import EmbedSettings
from frozen_fast.search.collection import Collection
from frozen_fast.search.embed import Autocast, clip_vectors, loader_for
from frozen_fast.search.index_folder import BAD_CLIPS_FILE, WORK_FOLDER, IndexFolder, IndexInfo
from frozen_fast.search.row_table import (
    ContentKey,
    Row,
    content_key,
    iterate_rows,
    read_table,
    row_clip,
    to_table,
    write_table,
)

log = logging.getLogger(__name__)

PART_ROWS = 1024
PART_SECONDS = 30.0
VECTOR = "vector"
JOB_FILE = "job.json"
BLOCK_ROWS = 8192

Progress = Callable[[int, int], None]
"""Called with (clips embedded since the last call, bad clips since the last call)."""

Place = tuple[str, int]
"""Where a vector is: a part's file name (empty: the index) and the row in it."""


@dataclass(frozen=True)
class EmbedSummary:
    """Result of an embedding.

    Attributes:
        rows: clips of the index now.
        embedded: vectors that were computed.
        reused: rows whose vectors were there already.
        removed: rows whose clip the source no longer holds, or whose file changed.
        bad_clips: clips that could not be read.
    """

    rows: int
    embedded: int
    reused: int
    removed: int
    bad_clips: list[BadClip]


@dataclass(frozen=True)
class Plan:
    """The work of an embedding job, planned on rank 0.

    Attributes:
        rows: the source's rows.
        todo: numbers of rows that have no vector yet, in order.
        places: row number -> where its vector is, for the others.
        source_kind: "image" where all clips are pictures, else "video".
    """

    rows: list[Row]
    todo: list[int]
    places: dict[int, Place]
    source_kind: str


def plan_job(folder: Path, info: IndexInfo, collection: Collection, *, keep_others: bool = False) -> Plan:
    """Find out which rows need embedding.

    Args:
        folder: the index's folder; may hold an index, and parts of an embedding that was killed.
        info: the index to be, without segments.
        collection: what the source holds.
        keep_others: as finish_job takes it.

    Raises:
        UserError: the folder holds an index or parts of another model or other settings, or nothing can be embedded.
    """
    rows = collection.rows
    if not rows:
        raise UserError(
            f"--source: got {len(collection.bad_clips)} unreadable clips only; allowed: at least one readable clip"
        )
    index = IndexFolder.open(folder) if (folder / "index.json").exists() else None
    whole = "image" if all(row["kind"] == "image" for row in rows) else "video"
    if index is not None and keep_others and index.info.source_kind != whole:
        if whole == "video":
            got = "got videos for an index of pictures, whose vectors are of one frame"
            raise UserError(f"--add: {got}; allowed: pictures, or another folder")
        whole = "video"
    job = {**job_identity(info), "source_kind": whole}
    known = _finished_rows(folder / WORK_FOLDER, job)
    if known:
        log.info("embed: %d clips of an unfinished embedding are kept", len(known))
    if index is not None:
        same_kind = index.info.source_kind == whole
        check_same_job({**job_identity(index.info), "source_kind": whole}, job, folder)
        for number, row in enumerate(iterate_rows(index.table)):
            if index.alive_N[number] and (same_kind or row["kind"] == "video"):
                known[content_key(row)] = ("", number)
    places: dict[int, Place] = {}
    todo = []
    for number, row in enumerate(rows):
        place = known.get(content_key(row))
        if place is None:
            todo.append(number)
        else:
            places[number] = place
    return Plan(rows, todo, places, whole)


def job_identity(info: IndexInfo) -> dict[str, Any]:
    """Settings that must be equal for comparable vectors."""
    return {"fingerprint": info.fingerprint, "settings": EmbedSettings(**info.settings).to_json(), "width": info.width}


def check_same_job(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to mix vectors of two models or settings.

    Raises:
        UserError: naming what differs.
    """
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise UserError(
                f"--output: got {str(folder)!r}, made with {name} {_short(found.get(name))}; allowed: the same as now "
                f"({_short(wanted[name])}), another folder, or --fresh"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def _finished_rows(work: Path, job: dict[str, Any]) -> dict[ContentKey, Place]:
    """Rows of the parts that an embedding left behind."""
    found: dict[ContentKey, Place] = {}
    for path in finished_parts(work, job):
        for number, row in enumerate(iterate_rows(read_table(path).drop_columns([VECTOR]))):
            found[content_key(row)] = (path.name, number)
    return found


def finished_parts(work: Path, job: dict[str, Any]) -> list[Path]:
    """The parts that a job which was killed left behind; those of another job are removed, since nothing names them."""
    try:
        same = json.loads((work / JOB_FILE).read_text(encoding="utf-8")) == job
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(work / JOB_FILE, job)
    return sorted(work.glob("part-*.arrow"))


def embed_rows(
    model: RetrievalModel,
    rows: Sequence[Row],
    source_kind: str,
    settings: EmbedSettings,
    work: Path,
    *,
    decode: DecodeConfig,
    batch_size: int,
    autocast: Autocast,
    progress: Progress,
) -> list[BadClip]:
    """Embed rows and write them to parts; one process's share of a job.

    Args:
        model: on its device.
        rows: what to embed.
        source_kind: of the whole source: pictures among videos have as many frames as these.
        settings: test-time windows.
        work: where parts go.
        decode: how clips become frames, with on_bad_clip="skip".
        batch_size: windows per forward pass.
        autocast: as in evaluation.
        progress: told after each clip.

    Returns:
        The clips that could not be read.
    """
    clips = [row_clip(row) for row in rows]
    source = Source("source", "rows", clips, "image" if source_kind == "image" else "video")
    if not clips:
        return []
    loader = loader_for(model, source, settings, decode, batch_size)
    return write_parts(PartWriter(work), rows, clip_vectors(model, loader, autocast), loader.dropped, progress)


def write_parts(
    writer: PartWriter,
    rows: Sequence[Row],
    vectors: Iterable[tuple[int, torch.Tensor]],
    dropped: Mapping[int, BadClip],
    progress: Progress,
) -> list[BadClip]:
    """Write what a loader's clips give, as it comes.

    Args:
        writer: of the parts.
        rows: by the loader's index of a clip.
        vectors: (index, what the clip gave).
        dropped: the loader's; grows meanwhile.
        progress: told after each clip.

    Returns:
        The clips that could not be read.
    """
    bad = 0
    for index, value in vectors:
        writer.add(rows[index], value)
        progress(1, len(dropped) - bad)
        bad = len(dropped)
    if len(dropped) > bad:
        progress(0, len(dropped) - bad)
    writer.flush()
    return [dropped[index] for index in sorted(dropped)]


def vectors_table(rows: Sequence[Row], vectors: Sequence[np.ndarray]) -> pa.Table:
    """Rows of an index with one vector each."""
    vectors_ND = np.stack(vectors).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    return to_table(rows).append_column(VECTOR, column)


class PartWriter:
    """Collects rows and vectors, and writes a part every PART_ROWS rows or PART_SECONDS seconds."""

    def __init__(
        self, work: Path, table: Callable[[Sequence[Row], Sequence[np.ndarray]], pa.Table] = vectors_table
    ) -> None:
        """Write to a folder; `table` makes what a part holds."""
        self._work, self._table = work, table
        self._rows: list[Row] = []
        self._vectors: list[np.ndarray] = []
        self._written = time.monotonic()

    def add(self, row: Row, value: torch.Tensor) -> None:
        """Take one row and its vector or vectors."""
        self._rows.append(row)
        self._vectors.append(value.numpy())
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._written >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, whole or not at all."""
        if self._rows:
            write_table(self._work / f"part-{uuid.uuid4().hex}.arrow", self._table(self._rows, self._vectors))
        self._rows, self._vectors = [], []
        self._written = time.monotonic()


def finish_job(
    folder: Path, info: IndexInfo, plan: Plan, bad_clips: Sequence[BadClip], *, keep_others: bool = False
) -> EmbedSummary:
    """Add what the ranks wrote to the index, take out what the source no longer holds, and remove the parts.

    Args:
        folder: the index's folder.
        info: the index to be, without segments.
        plan: as plan_job gave it.
        bad_clips: of all ranks and of the listing.
        keep_others: rows whose files the source does not name stay in the index.

    Raises:
        UserError: no clip could be embedded.
    """
    work = folder / WORK_FOLDER
    places = dict(plan.places)
    written = _finished_rows(work, {**job_identity(info), "source_kind": plan.source_kind})
    for number in plan.todo:
        place = written.get(content_key(plan.rows[number]))
        if place is not None:
            places[number] = place
    if not places:
        raise UserError(
            f"--source: got {len(bad_clips)} clips, none of them readable; allowed: at least one readable clip"
        )
    exists = (folder / "index.json").exists()
    index = IndexFolder.open(folder) if exists else IndexFolder.create(folder, info)
    wanted = {tuple(plan.rows[number].values()): number for number in places}
    gone = []
    named = {row["path"] for row in plan.rows}
    for number, row in enumerate(iterate_rows(index.table)):
        if not index.alive_N[number]:
            continue
        same = wanted.get(tuple(row.values()))
        if same is not None and plan.places.get(same, ("part", 0))[0] == "":
            del wanted[tuple(row.values())]
        elif not keep_others or row["path"] in named:
            gone.append(number)
    added = sorted(wanted.values())
    if added:
        vectors = VectorReader(work, index)
        blocks = (added[first : first + BLOCK_ROWS] for first in range(0, len(added), BLOCK_ROWS))
        table = to_table([plan.rows[number] for number in added])
        index.append(table, (vectors.read([places[number] for number in block]) for block in blocks))
    index.remove(np.array(gone, np.int64))
    index.update(
        source_kind=plan.source_kind, bad_clips=len(bad_clips), checkpoint=info.checkpoint, tokenizer=info.tokenizer
    )
    write_atomically(folder / BAD_CLIPS_FILE, "".join(json.dumps(asdict(bad)) + "\n" for bad in bad_clips))
    shutil.rmtree(work)
    embedded = sum(number in places for number in plan.todo)
    return EmbedSummary(index.alive, embedded, len(places) - embedded, len(gone), list(bad_clips))


class VectorReader:
    """Reads vectors from the parts and from the index that they are added to."""

    def __init__(self, work: Path, index: IndexFolder) -> None:
        self._work = work
        self._index = index
        self._parts: dict[str, np.ndarray] = {}

    def read(self, places: Sequence[Place]) -> np.ndarray:
        """Vectors of some places, fp32 [n, D]."""
        return np.stack([self._one(name, row) for name, row in places])

    def _one(self, name: str, row: int) -> np.ndarray:
        if not name:
            return self._index.take(np.array([row]))[0]
        if name not in self._parts:
            column = read_table(self._work / name)[VECTOR].combine_chunks()
            self._parts[name] = column.flatten().to_numpy().reshape(len(column), -1)
        return self._parts[name][row]


def share_of(plan: Plan, rank: int, world_size: int) -> list[Row]:
    """The rows that a rank embeds: neighbours go to different ranks, so that long clips are spread."""
    return [plan.rows[number] for number in plan.todo[rank::world_size]]


def discard(folder: Path) -> None:
    """Remove an index and what is left of an embedding, and nothing else.

    Raises:
        UserError: the folder holds something that is no index.
    """
    if not folder.exists():
        return
    ours = ("index.json", BAD_CLIPS_FILE, WORK_FOLDER, ".lock")
    for path in folder.iterdir():
        if path.name not in ours and not path.name.startswith(("segment-", "removed-", "neighbours-")):
            raise UserError(
                f"--output: got {str(folder)!r}, which contains {path.name}; allowed: an index, or a new folder"
            )
    for path in folder.iterdir():
        if path.name == WORK_FOLDER:
            shutil.rmtree(path)
        elif path.name != ".lock":
            os.unlink(path)


def captions_of(folder: IndexFolder, most: int) -> list[str]:
    """Captions of evenly spread rows that have one, for measuring recall with real queries."""
    captions = [text for text in folder.table["caption"].filter(pa.array(folder.alive_N)).to_pylist() if text]
    step = max(1, len(captions) // most)
    return captions[::step][:most]
