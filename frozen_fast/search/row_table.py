"""The Arrow table of an index: what each vector is, and the state of its file when it was embedded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.sources import Clip
from frozen_fast.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("caption", pa.string()),
        pa.field("file_bytes", pa.int64(), nullable=False),
        pa.field("file_mtime_ns", pa.int64(), nullable=False),
        pa.field("file_digest", pa.string(), nullable=False),
    ]
)
"""Columns of rows.arrow. start_seconds and end_seconds are null where the clip is the whole file; caption is the first
one, null where there is none; file_digest covers the first DIGEST_BYTES of the file."""

DIGEST_BYTES = 65_536

Row = dict[str, Any]
"""One row of the table, by column."""

ContentKey = tuple[str, int, int, str, str, float | None, float | None]


class FileMark(NamedTuple):
    """What tells that a file is the same as before: its size, its time of change, and a hash of its beginning."""

    bytes: int
    mtime_ns: int
    digest: str


def file_of(path: str) -> str:
    """The file on disk that holds a clip: of a packed clip (`shard-00000.tar#17`), its shard."""
    where = parse_address(path)
    return path if where is None else where.file


def mark_file(path: str) -> FileMark:
    """Look at a file.

    Raises:
        OSError: it is missing or cannot be read.
    """
    status = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(DIGEST_BYTES), digest_size=8).hexdigest()
    return FileMark(status.st_size, status.st_mtime_ns, digest)


def clip_row(clip: Clip, mark: FileMark) -> Row:
    """A clip as a row; its path becomes absolute, so that an index can be searched from any folder."""
    return {
        "id": clip.id,
        "path": os.path.abspath(clip.path),
        "kind": clip.kind,
        "start_seconds": clip.start_seconds,
        "end_seconds": clip.end_seconds,
        "caption": clip.captions[0] if clip.captions else None,
        "file_bytes": mark.bytes,
        "file_mtime_ns": mark.mtime_ns,
        "file_digest": mark.digest,
    }


def row_clip(row: Row) -> Clip:
    """The clip of a row."""
    captions = () if row["caption"] is None else (row["caption"],)
    return Clip(row["id"], row["path"], captions, row["kind"], row["start_seconds"], row["end_seconds"])


def content_key(row: Row) -> ContentKey:
    """What decides a row's vector, wherever its file lies: equal for a file that was moved, other for a changed one."""
    where = parse_address(row["path"])
    part = "" if where is None else f"{where.shard}#{where.row}"
    return (
        row["file_digest"],
        row["file_bytes"],
        row["file_mtime_ns"],
        part,
        row["kind"],
        row["start_seconds"],
        row["end_seconds"],
    )


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table with SCHEMA's columns."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=65_536)
    temporary.replace(path)


def read_table(path: Path) -> pa.Table:
    """Open an Arrow IPC file, memory-mapped.

    Raises:
        UserError: it is missing or no Arrow file.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"index: {path} cannot be read ({' '.join(str(error).split())})") from None


def iterate_rows(table: pa.Table, batch_rows: int = 8192) -> Iterable[Row]:
    """Rows of a table in order, a batch at a time in memory."""
    for batch in table.to_batches(max_chunksize=batch_rows):
        yield from batch.to_pylist()
