"""Conceptual Captions 3M: a table of thumbnailUrl and caption, pictures named by the CRC-32 of their URL."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, read_table, require_file, require_folder
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout

# split -> (table, folder of pictures)
SPLITS = {
    "train": ("Train_GCC-training-success-020321-VALIDIMG.csv", "training"),
    "val": ("Validation_GCC-1.1.0-Validation-success-020321-VALIDIMG.csv", "validation"),
}


def read_cc3m(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Pictures of a CC3M folder; the file of a row is training|validation/<crc32 of its URL>, no extension."""
    root = require_folder(Path(config.path), key)
    table, folder = SPLITS[config.split]
    for row in read_table(require_file(root / table, key), ("thumbnailUrl", "caption")):
        if not row["thumbnailUrl"]:
            collector.drop("no thumbnailUrl", row["caption"])
            continue
        identity = str(zlib.crc32(row["thumbnailUrl"].encode()))
        yield Clip(
            id=identity,
            path=f"{root}/{folder}/{identity}",
            captions=(row["caption"],) if row["caption"] else (),
            kind="image",
            split=config.split,
        )


CC3M = Layout(
    data_set="CC3M",
    read=read_cc3m,
    published={"": {"train": (), "val": ()}},  # how many pictures can still be downloaded differs from copy to copy
    get_from="Conceptual Captions: URLs at ai.google.com/research/ConceptualCaptions; pictures with a downloader",
)
