"""HMDB51: <class>/<video>.avi and testTrainMulti_7030_splits/<class>_test_splitN.txt, three splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_list, require_folder
from frozen_fast.data.sources.class_names import in_words
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError

USE = {"0": "unused", "1": "train", "2": "test"}
"""Meaning of the number after a video's name; most videos are in neither part of a split."""

LIST_FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits")
VIDEO_FOLDERS = ("hmdb51_org", "videos", "hmdb51")


def read_hmdb51(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos of one of the three splits; the class is the list's name, and the caption its name in words."""
    root = Path(config.path)
    lists = folder_with(root, LIST_FOLDERS, ".", key)
    videos = folder_with(root, VIDEO_FOLDERS, ".", key)
    suffix = f"_test_split{config.split_version}.txt"
    files = sorted(lists.glob(f"*{suffix}"))
    require_folder(lists if files else lists / f"*{suffix}", key)
    collector.classes = [in_words(file.name.removesuffix(suffix)) for file in files]
    for file in files:
        folder = file.name.removesuffix(suffix)
        label = in_words(folder)
        for number, line in enumerate(read_list(file), start=1):
            cells = line.rsplit(maxsplit=1)
            if len(cells) != 2 or cells[1] not in USE:
                raise UserError(f"{file}:{number}: got {line!r:.80}; allowed: a video and 0, 1 (train) or 2 (test)")
            if USE[cells[1]] == config.split:
                path = str(videos / folder / cells[0])
                identity = f"{folder}/{cells[0]}"
                yield Clip(id=identity, path=path, captions=(label,), split=config.split, label=label)


HMDB51 = Layout(
    data_set="HMDB51",
    read=read_hmdb51,
    published={str(split): {"train": (3570,), "test": (1530,)} for split in (1, 2, 3)},
    get_from="hmdb51_org.rar and test_train_splits.rar: serre-lab.clps.brown.edu, resource HMDB51",
)
