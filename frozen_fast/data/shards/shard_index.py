"""Index of a finished folder of packed frames, with checks. Tables are memory-mapped."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from frozen_fast.data.decode.types import ClipError, VideoInfo
from frozen_fast.data.shards import layout
from frozen_fast.data.shards.layout import Address
from frozen_fast.errors import UserError, reason

_COUNTS = ("clips", "frames", "bad_clips")
_MOST_SIDE = 65535  # of a JPEG, pixels


@dataclass(frozen=True)
class ShardIndex:
    """Content of a folder of packed frames.

    Attributes:
        folder: the folder.
        kind: of all of its clips.
        splits: split -> number of clips.
        bad_clips: clips of the source that could not be packed.
        shard_bytes: the size of each shard, by number.
        clips: [clips] layout.CLIP_DTYPE.
        frames: [frames] layout.FRAME_DTYPE.
        settings: those of packing.
    """

    folder: str
    kind: Literal["video", "image"]
    splits: dict[str, int]
    bad_clips: int
    shard_bytes: tuple[int, ...]
    clips: np.ndarray
    frames: np.ndarray
    settings: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> ShardIndex:
        """Open a finished folder.

        Raises:
            UserError: it is not finished, a file is missing or has the wrong length, or the index is malformed.
        """
        root = Path(folder)
        value = _read_index(root)
        try:
            clips, frames, bad_clips = (int(value[name]) for name in _COUNTS)
            kind: Literal["video", "image"] = {"video": "video", "image": "image"}[value["kind"]]  # type: ignore[assignment]
            splits = {str(split): int(count) for split, count in value["splits"].items()}
            files = {str(name): int(size) for name, size in value["files"].items()}
            shards = tuple(int(size) for size in value["shard_bytes"])
            settings = dict(value["settings"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{root / layout.INDEX}: not an index of packed frames ({error!r})") from None
        for name in (layout.CLIPS, layout.CLIP_TABLE, layout.FRAME_TABLE):
            _check_size(root / name, files.get(name, -1))
        for number, size in enumerate(shards):
            _check_size(root / layout.shard_name(number), size)
        return cls(
            folder=os.fspath(folder),
            kind=kind,
            splits=splits,
            bad_clips=bad_clips,
            shard_bytes=shards,
            clips=_table(root / layout.CLIP_TABLE, layout.CLIP_DTYPE, clips),
            frames=_table(root / layout.FRAME_TABLE, layout.FRAME_DTYPE, frames),
            settings=settings,
        )

    def clip(self, where: Address) -> tuple[np.void, np.ndarray]:
        """A clip's row and its frames' rows.

        Raises:
            ClipError: the clip does not exist, is in another shard, or its row is invalid.
        """
        path = f"{where.file}#{where.row}"
        if where.row >= len(self.clips):
            raise ClipError("decode_failed", f"packed clip {where.row} of {len(self.clips)}", path)
        row = self.clips[where.row]
        shard, first, count = int(row["shard"]), int(row["first_frame"]), int(row["frames"])
        if layout.shard_name(shard) != where.shard or shard >= len(self.shard_bytes):
            raise ClipError("decode_failed", f"the index has this clip in {layout.shard_name(shard)}", path)
        sides = (int(row["height"]), int(row["width"]))
        frames = self.frames[first : first + count]
        if count < 1 or len(frames) != count or not all(0 < side <= _MOST_SIDE for side in sides):
            raise ClipError("decode_failed", "damaged index: the clip's row is invalid", path)
        return row, frames

    def info(self, where: Address, kind: str, *, max_pixels: int) -> VideoInfo:
        """Number, size and times of a packed clip's frames.

        Raises:
            ClipError: as for clip(), and for another kind or frames with too many pixels.
        """
        row, frames = self.clip(where)
        path = f"{where.file}#{where.row}"
        height, width = int(row["height"]), int(row["width"])
        if kind != self.kind:
            raise ClipError("not_a_video", f"packed as {self.kind}, read as {kind}", path)
        if height * width > max_pixels:
            raise ClipError("too_large", f"frames of {width} x {height}; allowed: {max_pixels} pixels", path)
        times, rate = np.array(frames["seconds"]), float(row["frames_per_second"])
        if not (np.isfinite(times).all() and (np.diff(times) >= 0).all() and np.isfinite(rate) and rate > 0):
            raise ClipError("decode_failed", "damaged index: the clip's times are invalid", path)
        return VideoInfo(
            num_frames=len(frames),
            frames_per_second=rate,
            width=width,
            height=height,
            codec="jpeg" if kind == "video" else "image",
            presentation_seconds=times - times[0],
        )


def _read_index(root: Path) -> dict[str, Any]:
    path = root / layout.INDEX
    if not path.is_file():
        packing = (root / layout.SETTINGS).is_file()
        why = "packing is not finished, run frozen-fast pack again" if packing else "no index.json"
        raise UserError(f"{str(root)!r}: {why}; allowed: a folder that frozen-fast pack has finished")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format") != "frozen_fast frame shards":
        raise UserError(f"{path}: not an index of packed frames; allowed: what frozen-fast pack writes")
    if value.get("version") != layout.VERSION:
        raise UserError(f"{path}: version: got {value.get('version')!r}; allowed: {layout.VERSION} (pack again)")
    return value


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: missing; allowed: every file that {layout.INDEX} lists") from None
    if size != expected:
        raise UserError(f"{path}: got {size} bytes; allowed: {expected}, as {layout.INDEX} says (an unfinished copy?)")


def _table(path: Path, dtype: np.dtype, rows: int) -> np.ndarray:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # noqa: BLE001  a damaged header is parsed as Python and raises almost anything
        raise UserError(f"{path}: not a table of packed frames ({reason(error)})") from None
    if table.dtype != dtype or table.shape != (rows,):
        raise UserError(f"{path}: got {table.shape} of {table.dtype}; allowed: {rows} rows, as {layout.INDEX} says")
    return table


_open: dict[str, ShardIndex] = {}
_lock = Lock()


def _new_lock_after_fork() -> None:
    """Another thread may have held the lock when this process was forked."""
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_new_lock_after_fork)


def open_index(folder: str | Path) -> ShardIndex:
    """Open a folder again, and cache it for this process's decoders."""
    index = ShardIndex.open(folder)
    with _lock:
        _open[os.fspath(folder)] = index
    return index


def index_of(where: Address) -> ShardIndex:
    """The index that an address belongs to, opened once in a process.

    Raises:
        ClipError: it cannot be opened.
    """
    index = _open.get(where.folder)
    if index is None:
        try:
            index = open_index(where.folder)
        except UserError as error:
            there = (Path(where.folder) / layout.INDEX).is_file()
            path = f"{where.file}#{where.row}"
            raise ClipError("decode_failed" if there else "missing", str(error), path) from None
    return index


def packed_info(where: Address, kind: str, *, max_pixels: int) -> VideoInfo:
    """As probe, for a packed clip, from the index."""
    return index_of(where).info(where, kind, max_pixels=max_pixels)
