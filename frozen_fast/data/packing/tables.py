"""The index of a packed folder, written from the shards' journals after the last clip."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from frozen_fast.common.files import fsync_folder, write_json
from frozen_fast.data.packing.writer import ShardWriter
from frozen_fast.data.shards import layout
from frozen_fast.data.shards.layout import PART


def write_index(folder: Path, writer: ShardWriter, *, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the tables and, last, index.json; returns what index.json holds.

    Args:
        folder: the packed folder.
        writer: with every clip added.
        kind: of the source.
        settings: those of packing.
    """
    shard_bytes = writer.finish()
    splits = _write_tables(folder, writer, kind)
    files = (layout.CLIPS, layout.CLIP_TABLE, layout.FRAME_TABLE)
    index = {
        "format": "frozen_fast frame shards",
        "version": layout.VERSION,
        "kind": kind,
        "clips": writer.packed,
        "frames": writer.frames,
        "bad_clips": writer.done - writer.packed,
        "splits": dict(splits),
        "settings": settings,
        "shard_bytes": shard_bytes,
        "files": {name: (folder / name).stat().st_size for name in files},
    }
    write_json(folder / layout.INDEX, index)
    return index


def _write_tables(folder: Path, writer: ShardWriter, kind: str) -> Counter[str]:
    """clips.jsonl, clips.npy and frames.npy; how many clips each split has."""
    packed_ids = {row["id"] for _, row in writer.rows() if "bad" not in row}
    paths = {name: folder / f"{name}{PART}" for name in (layout.CLIPS, layout.CLIP_TABLE, layout.FRAME_TABLE)}
    clips = _new_table(paths[layout.CLIP_TABLE], layout.CLIP_DTYPE, writer.packed)
    frames = _new_table(paths[layout.FRAME_TABLE], layout.FRAME_DTYPE, writer.frames)
    splits: Counter[str] = Counter()
    first = 0
    with paths[layout.CLIPS].open("w", encoding="utf-8") as lines:
        for shard, row in writer.rows():
            if "bad" in row:
                continue
            count = len(row["frame_numbers"])
            clips[row["row"]] = (
                first,
                count,
                shard,
                row["height"],
                row["width"],
                row["original_frames"],
                row["frames_per_second"],
            )
            for name, values in _frame_columns(row).items():
                frames[name][first : first + count] = values
            first += count
            splits[row.get("split", "")] += 1
            lines.write(json.dumps(_manifest_line(shard, row, packed_ids, kind)) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    for table in (clips, frames):
        if isinstance(table, np.memmap):
            table.flush()
    for name, path in paths.items():
        path.replace(folder / name)
    fsync_folder(folder)
    return splits


def _frame_columns(row: dict[str, Any]) -> dict[str, list[Any]]:
    """The frames of a journal's row; the first member of each clip is its description, the others are frames."""
    return {
        "offset": row["offsets"][1:],
        "length": row["lengths"][1:],
        "crc32": row["crc32"][1:],
        "number": row["frame_numbers"],
        "seconds": row["seconds"],
    }


def _manifest_line(shard: int, row: dict[str, Any], packed_ids: set[str], kind: str) -> dict[str, Any]:
    """A clip's line; a picture among videos is a video of one frame once it is packed."""
    line = {"id": row["id"], "path": layout.address(shard, row["row"])}
    line |= {"captions": row["captions"], "kind": kind}
    line |= {name: row[name] for name in ("split", "label") if name in row}
    if row.get("twin") in packed_ids:  # a twin that could not be read is no twin any more
        line["twin"] = row["twin"]
    return line


def _new_table(path: Path, dtype: np.dtype, rows: int) -> np.ndarray:
    if rows:
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows,))
    table = np.zeros(0, dtype)
    with path.open("wb") as file:
        np.lib.format.write_array(file, table, allow_pickle=False)
    return table
