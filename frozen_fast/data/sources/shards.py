"""A folder that frozen-fast pack wrote: its clips with their captions, as they were in the packed source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.common.files import read_json_lines
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.shards import layout
from frozen_fast.data.shards.index import open_index
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.files import ClipCollector, require_folder
from frozen_fast.data.sources.manifest import parse_line
from frozen_fast.errors import UserError, unknown_name

COULD_NOT_BE_PACKED = "could not be packed"


def read_shards(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Packed clips, those of config.split only where the packed source named splits.

    Raises:
        UserError: packing is not finished, a file is missing or has another length than the index says, or
            clips.jsonl does not fit the tables.
    """
    root = require_folder(Path(config.path), key)
    index = open_index(root)
    if config.split and set(index.splits) != {""} and config.split not in index.splits:
        raise unknown_name(f"{key}.split", config.split, index.splits)
    for bad in read_json_lines(root / layout.BAD_CLIPS):
        collector.drop(COULD_NOT_BE_PACKED, str(bad.get("clip_id")))
    everything = not config.split or set(index.splits) == {""}
    files = [str(root / layout.shard_name(number)) for number in range(len(index.shard_bytes))]
    path = root / layout.CLIPS
    row = -1
    with path.open(encoding="utf-8") as lines:
        for row, line in enumerate(lines):
            clip = parse_line(line, f"{path}:{row + 1}", root)
            if row >= len(index.clips) or clip.path != f"{files[int(index.clips[row]['shard'])]}#{row}":
                raise UserError(f"{path}:{row + 1}: path: got {clip.path!r}; allowed: what {layout.CLIP_TABLE} says")
            if everything or clip.split == config.split:
                yield clip
    if row + 1 != len(index.clips):
        raise UserError(f"{path}: got {row + 1} lines; allowed: {len(index.clips)}, as {layout.INDEX} says")
