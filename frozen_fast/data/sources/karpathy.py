"""Image sets with Karpathy's splits: dataset_flickr30k.json and dataset_coco.json with the pictures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_json, records
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError

ANNOTATION_FOLDERS = (".", "annotations", "karpathy")
FOLD = 1000
"""Pictures of one of the five folds of COCO's 5,000 test pictures; the 1k protocol is the mean over the folds."""


@dataclass(frozen=True)
class KarpathyReader:
    """Reads one of the files.

    Attributes:
        annotation: its name.
        picture_folders: candidates for the folder that holds the pictures.
        splits: split of the config -> split names of the file.
    """

    annotation: str
    picture_folders: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]

    def __call__(self, config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
        """Pictures of a split, each with all its sentences (five, some of COCO's have more)."""
        root = Path(config.path)
        annotation = folder_with(root, ANNOTATION_FOLDERS, self.annotation, key) / self.annotation
        pictures = folder_with(root, self.picture_folders, ".", key)
        rows = records(read_json(annotation), "images", ("filename", "split"), annotation)
        chosen = [row for row in rows if row["split"] in self.splits[config.split]]
        if config.split_version.startswith("1k-"):
            fold = int(config.split_version.removeprefix("1k-")) - 1
            chosen = chosen[fold * FOLD : (fold + 1) * FOLD]
        for row in chosen:
            path = pictures / str(row.get("filepath", "")) / row["filename"]
            captions = _sentences(row, annotation)
            yield Clip(id=row["filename"], path=str(path), captions=captions, kind="image", split=config.split)


def _sentences(row: dict[str, Any], path: Path) -> tuple[str, ...]:
    sentences = row.get("sentences")
    entries = sentences if isinstance(sentences, list) else [None]
    raw: list[Any] = [entry.get("raw") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(text, str) for text in raw):
        where = f"{path}: {row['filename']}: sentences"
        raise UserError(f"{where}: got {sentences!r:.80}; allowed: a list of objects with raw, a string")
    return tuple(text.strip() for text in raw if text.strip())


FLICKR30K = Layout(
    data_set="Flickr30K",
    read=KarpathyReader(
        "dataset_flickr30k.json",
        ("flickr30k-images", "flickr30k_images", "images"),
        {"train": ("train",), "val": ("val",), "test": ("test",)},
    ),
    # The file holds 31,014 pictures; works that state 29,783 count all others of the 31,783 as training.
    published={"": {"train": (29000, 29783), "val": (1014, 1000), "test": (1000,)}},
    get_from="pictures: shannon.cs.illinois.edu/DenotationGraph; dataset_flickr30k.json: caption_datasets.zip of "
    "cs.stanford.edu/people/karpathy/deepimagesent",
)
_COCO_SPLITS = {"train": (113287,), "val": (5000,), "test": (5000,)}
COCO = Layout(
    data_set="COCO Captions",
    read=KarpathyReader(
        "dataset_coco.json", (".",), {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
    ),
    published={"5k": _COCO_SPLITS, **{f"1k-{fold}": {"test": (FOLD,)} for fold in range(1, 6)}},
    get_from="pictures (train2014, val2014): cocodataset.org/#download; dataset_coco.json: caption_datasets.zip of "
    "cs.stanford.edu/people/karpathy/deepimagesent",
)
