"""HowTo100M: speech (ASR) with its part of the video, joined over neighbouring pairs.

A pair of speech and video is short and badly aligned; the paper joins 5 contiguous pairs into a longer clip
(section 4.4). The version "joined-5" does this, "pairs" does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, read_json, read_table, require_file, require_folder
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import MediaFiles
from frozen_fast.errors import UserError

JOINED = {"joined-5": 5, "pairs": 1}
VIDEO_FOLDERS = ("videos", "HowTo100M_Videos")


def read_howto100m(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of the videos of HowTo100M_v1.csv in its order, with speech from captions/<id>.json or caption.json.

    caption.json is one object with all videos and is loaded completely (tens of gigabytes for all of HowTo100M);
    captions/<id>.json, one {"text", "start", "end"} per video, is read one video at a time and takes precedence.
    Remaining pairs at the end of a video are a clip too.
    """
    root = require_folder(Path(config.path), key)
    table = require_file(root / "HowTo100M_v1.csv", key)
    single = root / "captions"
    whole_file = single if single.is_dir() else require_file(root / "caption.json", key)
    speech = {} if single.is_dir() else read_json(whole_file)
    if not isinstance(speech, dict):
        raise UserError(f"{whole_file}: got {type(speech).__name__}; allowed: an object of video to its speech")
    videos = MediaFiles(root, VIDEO_FOLDERS, key)
    seen: set[str] = set()
    for row in read_table(table, ("video_id",)):
        video = row["video_id"]
        if video in seen:
            collector.drop("duplicate video", video)
            continue
        seen.add(video)
        source = single / f"{video}.json" if single.is_dir() else whole_file
        if single.is_dir():
            pairs = read_json(source) if source.is_file() else None
        else:
            pairs = speech.get(video)
        if pairs is None:
            collector.drop("no speech", video)
            continue
        yield from _clips(video, pairs, f"{source}: {video}", videos.path(video), JOINED[config.split_version])


def _clips(video: str, pairs: Any, where: str, path: str, joined: int) -> Iterator[Clip]:
    """Neighbouring pairs joined; a clip begins with its first pair and ends with the latest end among them."""
    columns: list[Any] = [pairs.get(name) if isinstance(pairs, dict) else None for name in ("text", "start", "end")]
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        raise UserError(f"{where}: got no equally long lists; allowed: text, start and end, one entry a pair")
    texts, starts, ends = columns
    for number, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
        times = all(type(value) in (int, float) and math.isfinite(value) for value in (start, end))
        if not isinstance(text, str) or not times or not 0 <= start <= end:
            raise UserError(f"{where}: pair {number}: got {(text, start, end)!r:.80}; allowed: text, 0 <= start <= end")
    for first in range(0, len(texts), joined):
        part = slice(first, first + joined)
        caption = " ".join(text.strip() for text in texts[part] if text.strip())
        begin, end = float(min(starts[part])), float(max(ends[part]))
        yield Clip(
            id=f"{video}-{first // joined}",
            path=path,
            captions=(caption,) if caption else (),
            start_seconds=begin,
            end_seconds=max(end, begin + 0.1),  # a pair may have no length
            split="train",
        )


HOWTO100M = Layout(
    data_set="HowTo100M",
    read=read_howto100m,
    published={version: {"train": ()} for version in JOINED},
    get_from="csv and captions: di.ens.fr/willow/research/howto100m; its authors give the videos on request",
)
