"""MSVD (YouTube2Text): lists of ids and raw-captions.pkl, as Collaborative Experts and CLIP4Clip publish them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_list, require_file
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.data.sources.pickles import load_word_captions

LIST_FOLDERS = (".", "structured-symlinks", "high-quality/structured-symlinks", "msvd_data")
VIDEO_FOLDERS = ("videos", "MSVD_Videos", "YouTubeClips")


def read_msvd(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of {train,val,test}_list.txt with all captions of raw-captions.pkl; videos by their id, any suffix."""
    root = Path(config.path)
    lists = folder_with(root, LIST_FOLDERS, "raw-captions.pkl", key)
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    captions = load_word_captions(lists / "raw-captions.pkl")
    for video in read_list(require_file(lists / f"{config.split}_list.txt", key)):
        yield Clip(id=video, path=videos.path(video), captions=captions.get(video, ()), split=config.split)


MSVD = Layout(
    data_set="MSVD",
    read=read_msvd,
    published={"": {"train": (1200,), "val": (100,), "test": (670,)}},
    get_from="videos: cs.utexas.edu/users/ml/clamp/videoDescription; lists and raw-captions.pkl: msvd_data.zip of the "
    "releases of github.com/ArrowLuo/CLIP4Clip",
)
