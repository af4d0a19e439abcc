"""The retrieval page: what a model finds for some queries, as one HTML file that needs no server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from frozen_fast.common.files import write_atomically

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(frozen=True)
class GalleryClip:
    """A clip on the page.

    Attributes:
        id: of the clip.
        path: its file; of a feature store, the store.
        captions: what is said of it.
        similarity: with the query.
        is_own: whether it is the query's own.
        start_seconds, end_seconds: its part of the file; None: from the beginning, to the end.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    similarity: float
    is_own: bool
    start_seconds: float | None = None
    end_seconds: float | None = None


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
    """A page: its title, the numbers in its head, and its queries."""

    title: str
    numbers: tuple[tuple[str, float], ...]
    queries: tuple[GalleryQuery, ...]


def write_gallery(path: Path, page: GalleryPage, videos: Path | None = None) -> None:
    """Write a page.

    Args:
        path: the HTML file.
        page: what it shows; every text is escaped.
        videos: a folder with a file ID.mp4 (or another video format) for each clip whose own path is no video.
    """

    def source(clip: GalleryClip) -> str | None:
        """The clip's file relative to the page, with its part of the time; None where there is none."""
        candidates = [Path(clip.path), *((videos / f"{clip.id}{suffix}") for suffix in VIDEO_SUFFIXES if videos)]
        found = next((one for one in candidates if one.suffix.lower() in VIDEO_SUFFIXES and one.is_file()), None)
        if found is None:
            return None
        part = ""
        if clip.start_seconds is not None or clip.end_seconds is not None:
            part = f"#t={clip.start_seconds or 0:g}" + (f",{clip.end_seconds:g}" if clip.end_seconds else "")
        return quote(os.path.relpath(found.resolve(), path.parent.resolve())) + part

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_atomically(path, templates.get_template("gallery.html").render(page=page, source=source))


def gallery_file(source: str) -> str:
    """The page's name in a run folder, for a source of evaluation."""
    return f"gallery_{''.join(letter if letter.isalnum() or letter in '-_' else '_' for letter in source)}.html"
