"""LSMDC: the layout that the released Frozen-in-Time code reads, and the challenge's tables that CLIP4Clip reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import (
    ClipCollector,
    folder_with,
    read_list,
    read_text,
    require_file,
    require_folder,
)
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.data.sources.pickles import load_word_captions
from frozen_fast.errors import UserError

TABLES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
TABLE_COLUMNS = 6
"""clip id, start and end aligned, start and end extracted, sentence."""

TABLE_FOLDERS = (".", "lsmdc_data")
VIDEO_FOLDERS = ("videos", "LSMDC_Videos", "LSMDC_Videos_Compress")


def read_lsmdc(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of structured-symlinks/{split}_list.txt and raw-captions.pkl; frame_tar_list.txt gives movie/clip.

    The video of a line `<anything>/<movie>/<clip>.tar` is videos/<movie>/<clip>.avi. A clip that is not in
    frame_tar_list.txt has no file and is counted as missing.
    """
    root = require_folder(Path(config.path), key)
    lists = root / "structured-symlinks"
    captions = load_word_captions(require_file(lists / "raw-captions.pkl", key))
    listed = (PurePosixPath(line) for line in read_list(require_file(root / "frame_tar_list.txt", key)))
    movies = {line.name.removesuffix(".tar"): line.parent.name for line in listed}
    for clip in read_list(require_file(lists / f"{config.split}_list.txt", key)):
        path = root / "videos" / movies.get(clip, "not in frame_tar_list.txt") / f"{clip}.avi"
        yield Clip(id=clip, path=str(path), captions=captions.get(clip, ()), split=config.split)


def read_lsmdc_clip4clip(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of the challenge's tab-separated tables without header; a clip with several lines has several captions."""
    root = Path(config.path)
    table = folder_with(root, TABLE_FOLDERS, TABLES[config.split], key) / TABLES[config.split]
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(table).splitlines(), start=1):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != TABLE_COLUMNS or not cells[0].strip():
            allowed = f"{TABLE_COLUMNS} columns split by tabs: clip, four times, sentence"
            raise UserError(f"{table}:{number}: got {len(cells)} columns; allowed: {allowed}")
        own, sentence = captions.setdefault(cells[0].strip(), []), cells[-1].strip()
        if sentence in own:
            collector.drop("duplicate sentence", cells[0].strip())
        elif sentence:
            own.append(sentence)
    for clip, own in captions.items():
        yield Clip(id=clip, path=videos.path(clip), captions=tuple(own), split=config.split)


_GET_FROM = "LSMDC requires a signed agreement: sites.google.com/site/describingmovies"
LSMDC = Layout(
    data_set="LSMDC",
    read=read_lsmdc,
    published={"": {"train": (101079,), "val": (7408,), "test": (1000,)}},
    get_from=_GET_FROM,
)
LSMDC_CLIP4CLIP = Layout(
    data_set="LSMDC",
    read=read_lsmdc_clip4clip,
    published={"": {"train": (), "val": (7408,), "test": (1000,)}},
    get_from=_GET_FROM,
)
