"""VATEX, English captions: vatex_data.json ({id: {"enCap": [..]}}) and lists of ids; there are two test splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_json, read_list, require_file
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

# version -> split -> list. hgr: the split of Chen et al. (HGR, 2020); 1k5: the test list that CLIP2Video reports.
LISTS = {
    "hgr": {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"},
    "1k5": {"train": "train_list.txt", "val": "val_list.txt", "test": "test1k5_sec_list.txt"},
}
LIST_FOLDERS = (".", "structured-symlinks", "vatex_data")
VIDEO_FOLDERS = ("videos", "VATEX_Videos")


def read_vatex(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a list with their English captions; ids and file names are <YouTube id>_<start>_<end>."""
    root = Path(config.path)
    lists = folder_with(root, LIST_FOLDERS, "vatex_data.json", key)
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    annotation = lists / "vatex_data.json"
    entries = read_json(annotation)
    if not isinstance(entries, dict):
        raise UserError(f"{annotation}: got {type(entries).__name__}; allowed: an object of clip to its captions")
    for clip in read_list(require_file(lists / LISTS[config.split_version][config.split], key)):
        captions = entries.get(clip, {"enCap": []})
        captions = captions.get("enCap") if isinstance(captions, dict) else None
        if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{annotation}: {clip}.enCap: got {captions!r:.80}; allowed: a list of strings")
        own = tuple(text.strip() for text in captions if text.strip())
        yield Clip(id=clip, path=videos.path(clip), captions=own, split=config.split)


_COUNTS = {"train": (25991,), "val": (1500,), "test": (1500,)}
VATEX = Layout(
    data_set="VATEX",
    read=read_vatex,
    published={"1k5": _COUNTS, "hgr": _COUNTS},
    get_from="captions and ids: eric-xw.github.io/vatex-website; lists: github.com/CryhanFang/CLIP2Video, data/vatex",
)
