"""DiDeMo: {train,val,test}_list.txt and {train,val,test}_data.json (video, description, times).

All descriptions of a video are its captions, so that `captions: paragraph` gives the paragraph protocol. The version
"moments" keeps the moments of the descriptions only (ground-truth proposals), "whole" the whole video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import (
    ClipCollector,
    folder_with,
    read_json,
    read_list,
    records,
    require_file,
)
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

PIECE_SECONDS = 5
"""Annotators marked moments in pieces of 5 seconds; [2, 3] is from second 10 to second 20."""

LIST_FOLDERS = (".", "structured-symlinks", "high-quality/structured-symlinks", "didemo_data", "DiDeMo_data")
VIDEO_FOLDERS = ("videos", "DiDeMo_Videos", "DiDeMo_Videos_Compress")


def read_didemo(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos of a list with all their descriptions in the annotation's order."""
    root = Path(config.path)
    lists = folder_with(root, LIST_FOLDERS, f"{config.split}_data.json", key)
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    annotation = lists / f"{config.split}_data.json"
    captions: dict[str, list[str]] = {}
    moments: dict[str, list[tuple[int, int]]] = {}
    for number, row in enumerate(records(read_json(annotation), "", ("video", "description"), annotation)):
        captions.setdefault(row["video"], []).append(row["description"].strip())
        moments.setdefault(row["video"], []).append(chosen_moment(row.get("times"), f"{annotation}: [{number}].times"))
    for video in read_list(require_file(lists / f"{config.split}_list.txt", key)):
        segments = joined_seconds(moments.get(video, [])) if config.split_version == "moments" else ()
        path = videos.path(video, PurePath(video).stem)
        own = tuple(text for text in captions.get(video, []) if text)
        yield Clip(id=video, path=path, captions=own, split=config.split, segments=segments)


def chosen_moment(times: Any, where: str) -> tuple[int, int]:
    """The moment that most annotators of a description chose (ties: the first): (first, last) piece of 5 seconds.

    Raises:
        UserError: times is no list of pairs of whole numbers in order.
    """
    pairs: list[Any] = times if isinstance(times, list) and times else [None]
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(piece) is int for piece in pair)
        if not whole or not 0 <= pair[0] <= pair[1]:
            raise UserError(f"{where}: got {pair!r:.80}; allowed: pairs [first piece, last piece], from 0")
    return Counter((first, last) for first, last in pairs).most_common(1)[0][0]


def joined_seconds(moments: list[tuple[int, int]]) -> tuple[tuple[float, float], ...]:
    """The union of moments as (start, end) in seconds, in order; touching moments are one."""
    pieces = sorted({piece for first, last in moments for piece in range(first, last + 1)})
    parts: list[tuple[float, float]] = []
    for piece in pieces:
        start, end = float(piece * PIECE_SECONDS), float((piece + 1) * PIECE_SECONDS)
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], end)
        else:
            parts.append((start, end))
    return tuple(parts)


_COUNTS = {"train": (8392,), "val": (1065,), "test": (1004,)}
DIDEMO = Layout(
    data_set="DiDeMo",
    read=read_didemo,
    published={"whole": _COUNTS, "moments": _COUNTS},
    get_from="annotations and videos: github.com/LisaAnne/LocalizingMoments; lists: github.com/albanie/"
    "collaborative-experts, misc/datasets/didemo",
)
