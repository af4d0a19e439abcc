"""Packs a source: writes JPEG frames of every clip to shards. A killed pack resumes; a finished one is reused."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from frozen_fast.common.files import append_text, open_lock, write_atomically, write_json
from frozen_fast.data.decode.types import ClipError
from frozen_fast.data.load.bad_clips import BadClip, BadClipLedger
from frozen_fast.data.packing.extract import PackSettings, extract
from frozen_fast.data.packing.pool import map_clips
from frozen_fast.data.packing.tables import write_index
from frozen_fast.data.packing.writer import ShardWriter
from frozen_fast.data.shards import layout
from frozen_fast.data.sources import Clip, Source
from frozen_fast.errors import UserError

Progress = Callable[[int, int, int], None]
"""Called after every clip with the number of clips done, in total, and bad."""


@dataclass(frozen=True, kw_only=True)
class PackLimits:
    """Limits of packing; they do not change the output.

    Attributes:
        workers: processes that decode; 0: this process.
        max_pixels: a larger frame is a bad clip.
        max_bad_share: packing fails if the share of unreadable clips exceeds this.
        timeout_seconds: a clip that takes longer to decode is bad.
    """

    workers: int = 0
    max_pixels: int = 50_000_000
    max_bad_share: float = 0.05
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class PackSummary:
    """Content of a packed folder.

    Attributes:
        folder: the folder.
        clips: packed clips.
        frames: their frames.
        bad_clips: unreadable clips.
        bytes: of all shards.
        reused: whether it was complete already.
    """

    folder: Path
    clips: int
    frames: int
    bad_clips: int
    bytes: int
    reused: bool


def pack_source(
    source: Source, folder: Path, settings: PackSettings, limits: PackLimits, progress: Progress | None = None
) -> PackSummary:
    """Pack a source into a folder, or continue an earlier call.

    Raises:
        UserError: the folder has other content, was started with other settings or another source, is used by another
            process, or too many clips are unreadable.
    """
    if source.format == "shards":
        raise UserError(f"format: got shards, source {source.name!r} is packed already; allowed: a source of files")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: got {str(folder)!r}; allowed: a folder that can be written to ({error})") from None
    with _locked(folder):
        _check_begun(folder, settings, source)
        if (folder / layout.INDEX).exists():
            return _summary(folder, json.loads((folder / layout.INDEX).read_text(encoding="utf-8")), reused=True)
        writer = ShardWriter(folder, settings.shard_bytes)
        try:
            _pack_rest(source, folder, writer, settings, limits, progress)
            if not writer.packed:
                raise UserError(f"source {source.name!r}: no clip could be packed, see {folder / layout.BAD_CLIPS}")
            index = write_index(folder, writer, kind=source.kind, settings=settings.to_json())
        finally:
            writer.close()
        return _summary(folder, index, reused=False)


def _pack_rest(
    source: Source,
    folder: Path,
    writer: ShardWriter,
    settings: PackSettings,
    limits: PackLimits,
    progress: Progress | None,
) -> None:
    total = len(source)
    ledger = _ledger(source, folder, writer, limits)
    rest = islice((source.clips[place] for place in range(writer.done, total)), None)
    work = partial(extract, settings=settings, max_pixels=limits.max_pixels)
    for clip, outcome in map_clips(work, rest, workers=limits.workers, timeout_seconds=limits.timeout_seconds):
        if isinstance(outcome, ClipError):
            writer.add_bad(clip, outcome)
            ledger.record(writer.done, 0, [_bad(source, clip.id, clip.path, outcome.cause, outcome.message)])
            ledger.check()
        else:
            writer.add(clip, outcome)
            ledger.record(writer.done, 1, [])
        if progress is not None:
            progress(writer.done, total, ledger.bad)
    ledger.check(final=True)


def _bad(source: Source, clip_id: str, path: str, cause: str, message: str) -> BadClip:
    return BadClip(source.name, clip_id, path, cause, message)


def _ledger(source: Source, folder: Path, writer: ShardWriter, limits: PackLimits) -> BadClipLedger:
    """The counts of bad clips, with bad_clips.jsonl rewritten from the journals."""
    rows = [
        {"step": place, **asdict(_bad(source, row["id"], **row["bad"]))}
        for place, (_, row) in enumerate(writer.rows(), start=1)
        if "bad" in row
    ]
    write_atomically(folder / layout.BAD_CLIPS, "".join(json.dumps(row) + "\n" for row in rows))
    ledger = BadClipLedger(partial(_append_rows, folder / layout.BAD_CLIPS), limits.max_bad_share)
    causes: dict[str, int] = {}
    for row in rows:
        causes[row["cause"]] = causes.get(row["cause"], 0) + 1
    ledger.resume({"clips": writer.packed, "causes": causes})
    return ledger


def _append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    append_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder; the lock is released when the process ends."""
    try:
        file = open_lock(folder / layout.LOCK)
    except OSError as error:
        raise UserError(f"--output: got {str(folder)!r}; allowed: a folder that can be written to ({error})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--output: another pack is writing to {str(folder)!r}; allowed: one at a time") from None
        yield


def _check_begun(folder: Path, settings: PackSettings, source: Source) -> None:
    """Write the source and the settings, or compare them with the stored ones."""
    wanted = {**settings.to_json(), "source": _fingerprint(source)}
    path = folder / layout.SETTINGS
    if not path.exists():
        others = [entry.name for entry in folder.iterdir() if entry.name != layout.LOCK and ".tmp" not in entry.name]
        if others:
            raise UserError(f"--output: {str(folder)!r} holds {others[0]!r}; allowed: a new, empty or packed folder")
        write_json(path, wanted)
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the settings of a pack ({error}); allowed: a new folder") from None
    for name, value in wanted.items():
        if begun.get(name) != value:
            field = "the source" if name == "source" else f"--{name.replace('_', '-')}"
            begun_with = f"{begun.get(name)}, with which {str(folder)!r} was started"
            raise UserError(f"{field}: got {value}; allowed: {begun_with}, or a new folder")


def _fingerprint(source: Source) -> str:
    """A hash of the clips without their paths, because files may move between two calls."""
    digest = hashlib.sha256()
    for clip in source.clips:
        digest.update(json.dumps(_identity(clip)).encode() + b"\n")
    return f"{len(source)} clips, {digest.hexdigest()[:16]}"


def _identity(clip: Clip) -> list[Any]:
    seen = [clip.id, clip.captions, clip.kind, clip.start_seconds, clip.end_seconds, clip.split, clip.twin]
    return seen + [value for value in (clip.label, clip.segments) if value]  # absent in folders packed without them


def _summary(folder: Path, index: dict[str, Any], *, reused: bool) -> PackSummary:
    size = sum(index["shard_bytes"])
    return PackSummary(folder, index["clips"], index["frames"], index["bad_clips"], size, reused)
