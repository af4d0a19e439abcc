"""Kinetics-400: {train,val,test}.csv (label, youtube_id, time_start, time_end) and trimmed clips.

Files are named <youtube_id>_<start>_<end> with six digits each, in <split>/<label>/ or <split>/.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_table
from frozen_fast.data.sources.class_names import in_words
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

LIST_FOLDERS = (".", "annotations", "kinetics400")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def read_kinetics(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a table in its order; videos that are no longer available are counted as missing."""
    root = Path(config.path)
    table = folder_with(root, LIST_FOLDERS, f"{config.split}.csv", key) / f"{config.split}.csv"
    clips = MediaFiles(root, (config.split, f"{config.split}_256", "videos"), key)
    for number, row in enumerate(read_table(table, COLUMNS), start=2):
        times = [row["time_start"], row["time_end"]]
        if not row["label"] or not row["youtube_id"] or not all(time.isdigit() for time in times):
            allowed = "a label, an id, and whole seconds from 0"
            raise UserError(f"{table}:{number}: got {', '.join(row.values())!r:.80}; allowed: {allowed}")
        name = f"{row['youtube_id']}_{int(times[0]):06d}_{int(times[1]):06d}"
        label = in_words(row["label"])
        path = clips.path(name, row["youtube_id"])
        yield Clip(id=name, path=path, captions=(label,), split=config.split, label=label)


KINETICS400 = Layout(
    data_set="Kinetics-400",
    read=read_kinetics,
    published={"": {"train": (), "val": (), "test": ()}},  # tables of several dates are in use
    get_from="tables and clips: github.com/cvdfoundation/kinetics-dataset, Kinetics-400",
)
