"""WebVid: metadata/results_{cut}_{split}.csv and videos/<page_dir>/<videoid>.mp4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, read_table, require_file, require_folder
from frozen_fast.data.sources.clip import Clip
from frozen_fast.errors import unknown_name

CUTS = ("2M", "10M")
SPLITS = ("train", "val")


def read_webvid(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a WebVid folder; a row without page_dir has no path and is a counted drop."""
    if config.cut not in CUTS:
        raise unknown_name(f"{key}.cut", config.cut, CUTS)
    if config.split not in SPLITS:
        raise unknown_name(f"{key}.split", config.split, SPLITS)
    root = require_folder(Path(config.path), key)
    table = require_file(root / "metadata" / f"results_{config.cut}_{config.split}.csv", key)
    videos = root / "videos"
    for row in read_table(table, ("videoid", "name", "page_dir")):
        if not row["videoid"]:
            collector.drop("no videoid", row["name"])
        elif not row["page_dir"]:
            collector.drop("no page_dir", row["videoid"])
        else:
            yield Clip(
                id=row["videoid"],
                path=f"{videos}/{row['page_dir']}/{row['videoid']}.mp4",
                captions=(row["name"],) if row["name"] else (),
                split=config.split,
            )
