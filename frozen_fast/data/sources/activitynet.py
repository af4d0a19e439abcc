"""ActivityNet Captions: {train,val}_ids.json, train.json, val_1.json; a video's sentences are its paragraph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, folder_with, read_json, require_file
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

FILES = {"train": ("train_ids.json", "train.json"), "val": ("val_ids.json", "val_1.json")}
LIST_FOLDERS = (".", "structured-symlinks", "high-quality/structured-symlinks", "captions", "activitynet_data")
VIDEO_FOLDERS = ("videos", "Activity_Videos", "Activity_Videos_Compress", "ActivityNet_Videos")
ID_PREFIX = "v_"
"""Prefix of ids in the annotation; file names have it or not, depending on the downloader."""


def read_activitynet(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos of the id list with their sentences in order; use `captions: paragraph` for the paper's protocol."""
    root = Path(config.path)
    ids_name, captions_name = FILES[config.split]
    lists = folder_with(root, LIST_FOLDERS, captions_name, key)
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    annotation = lists / captions_name
    entries = read_json(annotation)
    if not isinstance(entries, dict):
        raise UserError(f"{annotation}: got {type(entries).__name__}; allowed: an object of video to its sentences")
    ids_file = require_file(lists / ids_name, key)
    ids = read_json(ids_file)
    if not isinstance(ids, list) or not all(isinstance(video, str) for video in ids):
        raise UserError(f"{ids_file}: got {type(ids).__name__}; allowed: a list of ids")
    for video in ids:
        sentences = entries.get(video, {"sentences": []})
        sentences = sentences.get("sentences") if isinstance(sentences, dict) else None
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise UserError(f"{annotation}: {video}.sentences: got {sentences!r:.80}; allowed: a list of strings")
        captions = tuple(text.strip() for text in sentences if text.strip())
        path = videos.path(video, video.removeprefix(ID_PREFIX))
        yield Clip(id=video, path=path, captions=captions, split=config.split)


ACTIVITYNET = Layout(
    data_set="ActivityNet Captions",
    read=read_activitynet,
    published={"": {"train": (10009,), "val": (4917,)}},
    get_from="captions: cs.stanford.edu/people/ranjaykrishna/densevid; videos: activity-net.org/download.html",
)
