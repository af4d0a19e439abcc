"""A data set layout from outside the tree: a folder per split, the caption is the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources import Clip, Layout
from frozen_fast.data.sources.annotation_files import ClipCollector, require_folder


def read_names(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of PATH/SPLIT, such as train/a_dog_runs.0001.mp4; a name without a number is a counted drop."""
    folder = require_folder(Path(config.path) / config.split, key)
    for path in sorted(folder.iterdir()):
        caption, _, number = path.stem.rpartition(".")
        if not number.isdigit():
            collector.drop("no number in its name", path.name)
            continue
        yield Clip(id=path.stem, path=str(path), captions=(caption.replace("_", " "),), split=config.split)


CAPTIONS_IN_NAMES = Layout(data_set="Captions in file names", read=read_names)
