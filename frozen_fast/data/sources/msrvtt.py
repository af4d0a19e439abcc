"""MSR-VTT: the layout that the released Frozen-in-Time code reads, and CLIP4Clip's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import (
    ClipCollector,
    folder_with,
    read_json,
    read_list,
    read_table,
    records,
    require_file,
    require_folder,
)
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.pickles import load_plain_pickle
from frozen_fast.errors import UserError

# version -> split -> list file. 1k-A is "jsfusion" in the released code, 1k-B "miech".
RELEASED_LISTS = {
    "1k-A": {"train": "train_list_jsfusion.txt", "test": "val_list_jsfusion.txt"},
    "1k-B": {"train": "train_list_miech.txt", "test": "test_list_miech.txt"},
    "full": {"train": "train_list_full.txt", "val": "val_list_full.txt", "test": "test_list_full.txt"},
}
_ONE_CAPTION_INDEX = {("1k-A", "test"): "jsfusion_val_caption_idx.pkl"}

# version -> split -> table of ids; "1k-A-7k" trains on the smaller of CLIP4Clip's two lists. The full version has no
# table: MSRVTT_data.json names each video's split.
CLIP4CLIP_TABLES = {
    "1k-A": {"train": "MSRVTT_train.9k.csv", "test": "MSRVTT_JSFUSION_test.csv"},
    "1k-A-7k": {"train": "MSRVTT_train.7k.csv", "test": "MSRVTT_JSFUSION_test.csv"},
    "full": {"train": "train", "val": "validate", "test": "test"},
}
_TABLE_FOLDERS = (".", "msrvtt_data")
_VIDEO_FOLDERS = ("videos/all", "MSRVTT_Videos", "videos")


def read_msrvtt(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of annotation/MSR_VTT.json, high-quality/structured-symlinks/*.txt and videos/all/<id>.mp4."""
    name = RELEASED_LISTS[config.split_version][config.split]
    root = require_folder(Path(config.path), key)
    lists = root / "high-quality" / "structured-symlinks"
    annotation = require_file(root / "annotation" / "MSR_VTT.json", key)
    captions = _captions_by_video(read_json(annotation), "annotations", "image_id", annotation)
    index_file = _ONE_CAPTION_INDEX.get((config.split_version, config.split))
    chosen = _caption_indices(require_file(lists / index_file, key)) if index_file else None
    for video in read_list(require_file(lists / name, key)):
        own = captions.get(video, [])
        if chosen is not None and own:
            own = _pick(own, chosen.get(video), video, lists / str(index_file))
        yield _clip(video, own, root / "videos" / "all", config.split)


def read_msrvtt_clip4clip(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of MSRVTT_data.json and CLIP4Clip's tables, in the root or in msrvtt_data/.

    Videos are in videos/all, MSRVTT_Videos or videos; the first folder that exists is used.
    """
    name = CLIP4CLIP_TABLES[config.split_version][config.split]
    root = require_folder(Path(config.path), key)
    tables = folder_with(root, _TABLE_FOLDERS, "MSRVTT_data.json", key)
    videos = folder_with(root, _VIDEO_FOLDERS, ".", key)
    if config.split == "test" and config.split_version != "full":
        for row in read_table(require_file(tables / name, key), ("video_id", "sentence")):
            yield _clip(row["video_id"], [row["sentence"]] if row["sentence"] else [], videos, config.split)
        return
    data_file = tables / "MSRVTT_data.json"
    data = read_json(data_file)
    captions = _captions_by_video(data, "sentences", "video_id", data_file)
    if config.split_version == "full":
        rows = records(data, "videos", ("video_id", "split"), data_file)
        ids = [row["video_id"] for row in rows if row["split"] == name]
    else:
        ids = [row["video_id"] for row in read_table(require_file(tables / name, key), ("video_id",))]
    for video in ids:
        yield _clip(video, captions.get(video, []), videos, config.split)


def _clip(video: str, captions: list[str], videos: Path, split: str) -> Clip:
    return Clip(id=video, path=f"{videos}/{video}.mp4", captions=tuple(captions), split=split)


def _captions_by_video(data: Any, field: str, id_column: str, path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in records(data, field, (id_column, "caption"), path):
        captions.setdefault(row[id_column], []).append(row["caption"].strip())
    return captions


def _caption_indices(path: Path) -> dict[str, int]:
    indices = load_plain_pickle(path)
    if not isinstance(indices, dict) or not all(type(index) is int for index in indices.values()):
        raise UserError(f"{path}: got {type(indices).__name__}; allowed: a dict of video to caption index")
    return indices


def _pick(captions: list[str], index: int | None, video: str, path: Path) -> list[str]:
    if index is None or not 0 <= index < len(captions):
        raise UserError(f"{path}: caption index of {video}: got {index}; allowed: 0 to {len(captions) - 1}")
    return [captions[index]]


_FULL = {"train": (6513,), "val": (497,), "test": (2990,)}
MSRVTT = Layout(
    data_set="MSR-VTT",
    read=read_msrvtt,
    published={
        "1k-A": {"train": (9000,), "test": (1000,)},
        "1k-B": {"train": (6656,), "test": (1000,)},
        "full": _FULL,
    },
    get_from="MSRVTT.zip of the Frozen-in-Time authors, robots.ox.ac.uk/~maxbain/frozen-in-time/data",
)
MSRVTT_CLIP4CLIP = Layout(
    data_set="MSR-VTT",
    read=read_msrvtt_clip4clip,
    published={
        "1k-A": {"train": (9000,), "test": (1000,)},
        "1k-A-7k": {"train": (7010,), "test": (1000,)},
        "full": _FULL,
    },
    get_from="msrvtt_data.zip of the releases of github.com/ArrowLuo/CLIP4Clip, videos of MSRVTT.zip",
)
