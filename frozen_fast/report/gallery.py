"""The retrieval page: the clips that a model finds for some queries, as one HTML file."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.data.decode.threads import map_in_threads
from frozen_fast.data.load.previews import preview_jpeg
from frozen_fast.data.load.video_frames import IMAGE_SUFFIXES
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.sources import Clip
from frozen_fast.errors import UserError

PLAYED_SUFFIXES = (".mp4", ".m4v", ".webm", ".ogv", ".mov")
"""Videos that browsers play; for others the page shows a frame."""
VIDEO_SUFFIXES = (*PLAYED_SUFFIXES, ".mkv", ".avi", ".mpg", ".mpeg", ".wmv", ".flv")
FRAME_WIDTH = 200
THREADS = 2


@dataclass(frozen=True)
class GalleryClip:
    """A clip on the page; is_own: whether it is the query's own."""

    clip: Clip
    similarity: float
    is_own: bool


@dataclass(frozen=True)
class GalleryQuery:
    """A query and what was found.

    Attributes:
        text: the caption.
        rank: of its own clip, from 1; clips of equal similarity share the mean of their ranks.
        own: its clip.
        found: the first clips, best first.
        weights: expert -> mixture weight of the caption; empty for models without.
    """

    text: str
    rank: float
    own: GalleryClip
    found: tuple[GalleryClip, ...]
    weights: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class GalleryPage:
    """A page.

    Attributes:
        source: the evaluated set.
        numbers: metrics in the page's head.
        all_queries: number of queries of the evaluation.
        queries: those shown: a draw, then the best and the worst of all.
        best: the queries found best, best first.
        worst: the queries found worst, worst first.
    """

    source: str
    numbers: tuple[tuple[str, float], ...]
    all_queries: int
    queries: tuple[GalleryQuery, ...]
    best: tuple[GalleryQuery, ...] = ()
    worst: tuple[GalleryQuery, ...] = ()

    @property
    def title(self) -> str:
        """The page's heading."""
        return f"Retrieval on {self.source}: {len(self.queries)} of {self.all_queries} queries"


def write_gallery(folder: Path, page: GalleryPage, videos: Path | None = None) -> Path:
    """Write a page, and beside it its best and worst queries as JSON, for the report.

    Args:
        folder: holds the page; clips are linked relative to it.
        page: what it shows; every text is escaped.
        videos: a folder with a file ID.mp4 (or another video format) for each clip whose own path is no video.

    Returns:
        The page's path.
    """
    shown = {one.clip.id: one.clip for query in page.queries for one in (query.own, *query.found)}
    clips = {name: _with_file(clip, videos) for name, clip in shown.items()}
    frames = dict(zip(clips, map_in_threads(_frame, list(clips.values()), THREADS), strict=True))

    def played(one: GalleryClip) -> str | None:
        """The clip's file relative to the page, with its part of the time; None where a browser does not play it."""
        clip = clips[one.clip.id]
        if clip is None or Path(clip.path).suffix.lower() not in PLAYED_SUFFIXES:
            return None
        part = ""
        if clip.start_seconds is not None or clip.end_seconds is not None:
            part = f"#t={clip.start_seconds or 0:g}" + (f",{clip.end_seconds:g}" if clip.end_seconds else "")
        return quote(os.path.relpath(Path(clip.path).resolve(), folder.resolve())) + part

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = folder / gallery_file(page.source)
    html = templates.get_template("gallery.html").render(
        page=page, played=played, frame=lambda one: frames[one.clip.id]
    )
    write_atomically(path, html)
    write_json(path.with_suffix(".json"), _extremes(page))
    return path


def gallery_file(source: str) -> str:
    """The page's name in a run folder, for a source of evaluation."""
    return f"gallery_{''.join(letter if letter.isalnum() or letter in '-_' else '_' for letter in source)}.html"


def _with_file(clip: Clip, videos: Path | None) -> Clip | None:
    """The clip with a file of its own, or with that of a folder of videos; None where there is neither."""
    if parse_address(clip.path) is not None:
        return clip
    candidates = [Path(clip.path), *((videos / f"{clip.id}{suffix}") for suffix in VIDEO_SUFFIXES if videos)]
    suffixes = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}
    found = next((one for one in candidates if one.suffix.lower() in suffixes and one.is_file()), None)
    return None if found is None else Clip(clip.id, str(found), (), clip.kind, clip.start_seconds, clip.end_seconds)


def _frame(clip: Clip | None) -> str | None:
    """The clip's middle frame as a data URL; None where there is no file or it cannot be read."""
    if clip is None:
        return None
    try:
        return "data:image/jpeg;base64," + base64.b64encode(preview_jpeg(clip, FRAME_WIDTH)).decode()
    except UserError:
        return None


def _extremes(page: GalleryPage) -> dict[str, Any]:
    """What the report says of a page."""

    def rows(queries: Iterable[GalleryQuery]) -> list[dict[str, Any]]:
        return [
            {
                "text": query.text,
                "rank": query.rank,
                "own": query.own.clip.id,
                "similarity": query.own.similarity,
                "first": query.found[0].clip.id,
                "first_similarity": query.found[0].similarity,
            }
            for query in queries
        ]

    return {
        "source": page.source,
        "page": gallery_file(page.source),
        "shown": len(page.queries),
        "all_queries": page.all_queries,
        "best": rows(page.best),
        "worst": rows(page.worst),
    }
