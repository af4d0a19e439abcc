"""Something-Something v2: labels/{train,validation,labels}.json and 20bn-something-something-v2/<id>.webm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_json, records, require_file
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

FILES = {"train": "train.json", "val": "validation.json"}
LIST_FOLDERS = ("labels", ".")
OLD_PREFIX = "something-something-v2-"
"""The first download named its files with it."""

VIDEO_FOLDERS = ("20bn-something-something-v2", "videos")


def read_something(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos with their template as class ("Putting something on a surface") and their own label as caption."""
    root = Path(config.path)
    try:
        lists, prefix = folder_with(root, LIST_FOLDERS, "labels.json", key), ""
    except UserError:
        lists, prefix = folder_with(root, LIST_FOLDERS, f"{OLD_PREFIX}labels.json", key), OLD_PREFIX
    classes_file = lists / f"{prefix}labels.json"
    classes = read_json(classes_file)
    if not isinstance(classes, dict) or not classes:
        raise UserError(f"{classes_file}: got {type(classes).__name__}; allowed: an object of class to number")
    collector.classes = list(classes)
    annotation = require_file(lists / f"{prefix}{FILES[config.split]}", key)
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    rows = records(read_json(annotation), "", ("id", "label", "template"), annotation)
    for number, row in enumerate(rows):
        label = row["template"].replace("[", "").replace("]", "")
        if label not in classes:
            where = f"{annotation}: [{number}].template"
            raise UserError(f"{where}: got {row['template']!r:.80}; allowed: a class of {classes_file.name}")
        caption = (row["label"],) if row["label"].strip() else ()
        yield Clip(id=row["id"], path=videos.path(row["id"]), captions=caption, split=config.split, label=label)


SOMETHING_V2 = Layout(
    data_set="Something-Something v2",
    read=read_something,
    published={"": {"train": (168913,), "val": (24777,)}},  # the test split's labels are not public
    get_from="labels and videos: qualcomm.com/developer/software/something-something-v-2-dataset",
)
