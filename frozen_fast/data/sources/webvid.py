"""WebVid: metadata/results_{version}_{split}.csv and videos/<page_dir>/<videoid>.mp4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, read_table, require_file, require_folder
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout


def read_webvid(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a WebVid folder; rows without page_dir have no path and are dropped."""
    root = require_folder(Path(config.path), key)
    table = require_file(root / "metadata" / f"results_{config.split_version}_{config.split}.csv", key)
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


WEBVID = Layout(
    data_set="WebVid",
    read=read_webvid,
    published={"2M": {"train": (), "val": ()}, "10M": {"train": (), "val": ()}},  # the paper rounds: 2.5M pairs
    get_from="WebVid is no longer distributed by its authors: a copy made before 2024, or another set of clips",
)
