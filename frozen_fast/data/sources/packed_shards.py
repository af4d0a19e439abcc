"""Shards that frozen-fast pack wrote, with the clips and captions of the packed source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.shards import layout
from frozen_fast.data.shards.shard_index import open_index
from frozen_fast.data.sources.annotation_files import ClipCollector, require_folder
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError, unknown_name

COULD_NOT_BE_PACKED = "could not be packed"


def read_shards(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Read packed clips; if the packed source has splits, only those of config.split.

    Raises:
        UserError: packing is not finished, a file is missing or has the wrong length, or clips.jsonl
            contradicts the tables.
    """
    root = require_folder(Path(config.path), key)
    index = open_index(root)
    if config.split and set(index.splits) != {""} and config.split not in index.splits:
        raise unknown_name(f"{key}.split", config.split, index.splits)
    if index.bad_clips:
        collector.drop(COULD_NOT_BE_PACKED, f"{root / layout.BAD_CLIPS} names them")
        collector.drops[COULD_NOT_BE_PACKED] += index.bad_clips - 1
    everything = not config.split or set(index.splits) == {""}
    files = [str(root / layout.shard_name(number)) for number in range(len(index.shard_bytes))]
    path = root / layout.CLIPS
    row = -1
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            clip = _clip(line, f"{path}:{row + 1}", root)
            shard = int(index.clips[row]["shard"]) if row < len(index.clips) else len(files)
            if shard >= len(files) or clip.path != f"{files[shard]}#{row}":
                raise UserError(f"{path}:{row + 1}: path: got {clip.path!r}; allowed: what {layout.CLIP_TABLE} says")
            if clip.kind != index.kind:
                raise UserError(f"{path}:{row + 1}: kind: got {clip.kind!r}; allowed: {index.kind}")
            if everything or clip.split == config.split:
                yield clip
    if row + 1 != len(index.clips):
        raise UserError(f"{path}: got {row + 1} lines; allowed: {len(index.clips)}, as {layout.INDEX} says")


def _clip(line: bytes, where: str, root: Path) -> Clip:
    """Parse a line of clips.jsonl, with any caption of the packed source."""
    try:
        row: dict[str, Any] = json.loads(line)
        captions, texts = row["captions"], [row["id"], row["path"], row["kind"], row.get("split", "")]
        texts += [row[name] for name in ("twin", "label") if row.get(name) is not None]
        if not isinstance(captions, list) or not captions or not all(isinstance(t, str) for t in [*texts, *captions]):
            raise TypeError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not a packed clip; allowed: what frozen-fast pack writes") from None
    return Clip(
        id=row["id"],
        path=str(root / row["path"]),
        captions=tuple(captions),
        kind=row["kind"],
        split=row.get("split", ""),
        twin=row.get("twin"),
        label=row.get("label"),
    )


SHARDS = Layout(data_set="packed shards", read=read_shards)
