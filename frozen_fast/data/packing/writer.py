"""Writes shards: a tar file and its journal, appended clip by clip, so that a killed pack can resume.

Both files have the suffix `.part` until the shard is full; the journal is renamed last. After a kill, the complete
journal lines whose frames are in the tar are kept, and the rest is truncated.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from frozen_fast.common.files import fsync_folder
from frozen_fast.data.decode.types import ClipError
from frozen_fast.data.packing.extract import StoredFrames
from frozen_fast.data.shards import layout
from frozen_fast.data.shards.layout import PART, TAR_BLOCK_BYTES, TAR_END
from frozen_fast.data.sources import Clip
from frozen_fast.errors import UserError


class ShardWriter:
    """Appends clips to shards.

    Attributes:
        done: number of clips processed, including bad ones.
        packed: clips packed.
        frames: their frames.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Open the folder and continue with its content.

        Raises:
            UserError: a finished shard of the folder is missing or damaged.
        """
        self.done = self.packed = self.frames = 0
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._number = 0
        while (journal := folder / layout.journal_name(self._number)).exists():
            self._count(read_journal(journal))
            self._check_finished(journal)
            self._number += 1
        self._tar, self._journal = self._take_up()

    def add(self, clip: Clip, stored: StoredFrames) -> None:
        """Append a clip."""
        name = f"{self.packed:08d}"
        entry: dict[str, Any] = {"id": clip.id, "captions": list(clip.captions), "kind": clip.kind}
        named = (("split", clip.split), ("twin", clip.twin), ("label", clip.label))
        entry |= {key: value for key, value in named if value}
        about = {
            "frame_numbers": stored.numbers,
            "seconds": stored.seconds,
            "height": stored.height,
            "width": stored.width,
            "original_frames": stored.original_frames,
            "frames_per_second": stored.frames_per_second,
        }
        members = [(f"{name}.json", json.dumps({**entry, **about}).encode())]
        members += [(f"{name}.{place:03d}.jpg", data) for place, data in enumerate(stored.jpegs)]
        blocks = [_member(name, data) for name, data in members]
        size = sum(len(block) for block in blocks)
        if self._tar.tell() and self._tar.tell() + size + len(TAR_END) > self._shard_bytes:
            self._close_shard()
        offset = self._tar.tell()
        row: dict[str, Any] = {"row": self.packed, **entry, **about, "offsets": [], "lengths": [], "crc32": []}
        for (_, data), block in zip(members, blocks, strict=True):
            row["offsets"].append(offset + TAR_BLOCK_BYTES)
            row["lengths"].append(len(data))
            row["crc32"].append(zlib.crc32(data))
            offset += len(block)
        self._tar.write(b"".join(blocks))
        self._tar.flush()
        self._note({**row, "end": offset})

    def add_bad(self, clip: Clip, error: ClipError) -> None:
        """Add an unreadable clip."""
        bad = {"path": clip.path, "cause": error.cause, "message": error.message}
        self._note({"id": clip.id, "bad": bad})

    def finish(self) -> list[int]:
        """Close the last shard; the size of every shard."""
        if self._journal.tell():
            self._close_shard()
        self.close()
        for name in (layout.shard_name(self._number), layout.journal_name(self._number)):
            (self._folder / f"{name}{PART}").unlink(missing_ok=True)
        return [(self._folder / layout.shard_name(number)).stat().st_size for number in range(self._number)]

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(shard, row) of every clip processed so far."""
        for number in range(self._number):
            for row in read_journal(self._folder / layout.journal_name(number)):
                yield number, row
        part = self._folder / f"{layout.journal_name(self._number)}{PART}"
        for row in read_journal(part) if part.exists() else ():
            yield self._number, row

    def close(self) -> None:
        """Close the open files."""
        self._tar.close()
        self._journal.close()

    def _note(self, row: dict[str, Any]) -> None:
        self._journal.write(json.dumps(row).encode() + b"\n")
        self._journal.flush()
        self._count([row])

    def _count(self, rows: list[dict[str, Any]]) -> None:
        good = [row for row in rows if "bad" not in row]
        self.done += len(rows)
        self.packed += len(good)
        self.frames += sum(len(row["frame_numbers"]) for row in good)

    def _parts(self) -> tuple[Path, Path]:
        """The growing tar and journal."""
        tar, journal = layout.shard_name(self._number), layout.journal_name(self._number)
        return self._folder / f"{tar}{PART}", self._folder / f"{journal}{PART}"

    def _take_up(self) -> tuple[BinaryIO, BinaryIO]:
        """Open the unfinished shard, truncated to its complete clips."""
        tar_path, journal_path = self._parts()
        finished_tar = self._folder / layout.shard_name(self._number)
        if finished_tar.exists() and not tar_path.exists():
            finished_tar.replace(tar_path)  # killed between the two renames
        tar_path.touch()
        journal_path.touch()
        rows, journal_bytes, tar_bytes = whole_rows(tar_path, journal_path)
        self._count(rows)
        os.truncate(tar_path, tar_bytes)
        os.truncate(journal_path, journal_bytes)
        return tar_path.open("ab"), journal_path.open("ab")

    def _close_shard(self) -> None:
        self._tar.write(TAR_END)
        for file in (self._tar, self._journal):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for part in self._parts():
            part.replace(part.with_name(part.name.removesuffix(PART)))
        fsync_folder(self._folder)
        self._number += 1
        tar_path, journal_path = self._parts()
        self._tar, self._journal = tar_path.open("wb"), journal_path.open("wb")

    def _check_finished(self, journal: Path) -> None:
        ends = [row["end"] for row in read_journal(journal) if "end" in row]
        expected = (ends[-1] if ends else 0) + len(TAR_END)
        tar = self._folder / layout.shard_name(self._number)
        size = tar.stat().st_size if tar.is_file() else None
        if size != expected:
            got = "no file" if size is None else f"{size} bytes"
            raise UserError(f"{tar}: got {got}; allowed: {expected} bytes, as {journal.name} says, or a new folder")


def _member(name: str, data: bytes) -> bytes:
    """A tar member: header, content, padding. Always the same bytes for the same content."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % TAR_BLOCK_BYTES)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a finished journal.

    Raises:
        UserError: a line that is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = _parsed(line)
        if row is None:
            raise UserError(f"{path}:{number}: damaged; allowed: an undamaged folder, or a new one")
        rows.append(row)
    return rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and "id" in row and ("bad" in row or "end" in row)
    return row if is_row else None


def whole_rows(tar: Path, journal: Path) -> tuple[list[dict[str, Any]], int, int]:
    """The complete rows of an unfinished shard, and their bytes in the journal and in the tar."""
    rows: list[dict[str, Any]] = []
    journal_bytes = tar_bytes = 0
    with tar.open("rb") as file:
        for line in journal.read_bytes().splitlines(keepends=True):
            row = _parsed(line)
            if not line.endswith(b"\n") or row is None or not _is_in(file, row):
                break
            rows.append(row)
            journal_bytes += len(line)
            tar_bytes = row.get("end", tar_bytes)
    return rows, journal_bytes, tar_bytes


def _is_in(file: BinaryIO, row: dict[str, Any]) -> bool:
    """Whether the tar contains all files of the row, including padding."""
    if "bad" in row:
        return True
    for offset, length, crc in zip(row["offsets"], row["lengths"], row["crc32"], strict=True):
        file.seek(offset)
        data = file.read(length)
        if len(data) != length or zlib.crc32(data) != crc:
            return False
    return file.seek(0, os.SEEK_END) >= row["end"]
