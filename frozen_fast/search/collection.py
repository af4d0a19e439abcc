"""The clips to embed: a folder of files, a manifest, packed shards or another format, optionally cut into spans."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from frozen_fast.config.extensions import layouts
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data import BadClip, Clip, read_source
from frozen_fast.data.decode import ClipError
from frozen_fast.data.decode.threads import map_in_threads
from frozen_fast.data.load.reading import probe
from frozen_fast.data.load.video_frames import IMAGE_SUFFIXES, kind_of
from frozen_fast.data.shards.layout import CLIP_TABLE
from frozen_fast.errors import UserError
from frozen_fast.search.row_table import FileMark, Row, clip_row, file_of, mark_file
from frozen_fast.search.scenes import scene_cuts

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv .3gp".split())
PROBED_AT_ONCE = 64
SHORTEST_REST = 0.5
"""A last span below this share of a span is joined to the one before it."""


@dataclass(frozen=True)
class Collection:
    """The rows to embed.

    Attributes:
        name: of the source, for messages.
        rows: in the order of the source; no vector yet.
        bad_clips: clips whose file is missing or, with spans, cannot be probed.
        drops: cause -> lines of the source that were left out.
    """

    name: str
    rows: list[Row]
    bad_clips: list[BadClip]
    drops: dict[str, int] = field(default_factory=dict)


def collect(
    path: str,
    *,
    format: str = "auto",
    split: str = "",
    span_seconds: float | None = None,
    scenes: bool = False,
    threads: int = 2,
    max_pixels: int = 50_000_000,
) -> Collection:
    """List what a source holds.

    Args:
        path: a folder, a manifest, a folder of packed shards, or what another format of data.sources takes.
        format: a format of data.sources (docs/data.md), "folder" (every video and picture below a folder), or "auto".
        split: of formats that have splits; empty: every line.
        span_seconds: cut videos into spans of this length, so that an answer says when; None: a clip is one row.
        scenes: cut videos where the scene changes (PySceneDetect); with span_seconds, a long scene is cut further.
        threads: files that are probed at the same time.
        max_pixels: a larger frame is a bad clip.

    Raises:
        UserError: nothing there, or not in the format.
    """
    if span_seconds is not None and not span_seconds > 0:
        raise UserError(f"--span: got {span_seconds:g}; allowed: seconds above 0")
    chosen, clips, drops = clips_of(path, format=format, split=split)
    bad: list[BadClip] = []
    rows = _rows(clips, chosen, bad, Cutter(span_seconds, scenes, max_pixels), threads)
    return Collection(chosen, rows, bad, dict(drops))


def clips_of(
    path: str, *, format: str = "auto", split: str = "", split_version: str = ""
) -> tuple[str, Sequence[Clip], dict[str, int]]:
    """The clips of a source; arguments as collect's.

    Returns:
        (the format that "auto" stands for, the clips, cause -> lines of the source that were left out).

    Raises:
        UserError: nothing there, or not in the format.
    """
    chosen = _format_of(Path(path)) if format == "auto" else format
    if chosen == "folder":
        return chosen, list(folder_clips(Path(path))), {}
    layouts.check(chosen, "--format")
    config = SourceConfig(path=path, format=chosen, split=split, split_version=split_version)
    source = read_source(config, "--source")
    return chosen, source.clips, source.drops


def folder_clips(folder: Path) -> Iterator[Clip]:
    """Every video and picture below a folder, by path; a clip's id is its path inside the folder.

    Raises:
        UserError: no folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"--source: got {str(folder)!r}, which is not a folder; allowed: a folder of videos and pictures"
        )
    found = False
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES or name.startswith("."):
                continue
            found = True
            file = Path(parent, name)
            yield Clip(file.relative_to(folder).as_posix(), str(file), (), kind_of(name))
    if not found:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise UserError(f"--source: got {str(folder)!r}, which contains no video or picture; allowed: {suffixes}")


def _format_of(path: Path) -> str:
    """The format that "auto" stands for."""
    if path.is_file():
        return "manifest"
    if path.is_dir():
        return "shards" if (path / CLIP_TABLE).is_file() else "folder"
    raise UserError(f"--source: got {str(path)!r}, which does not exist; allowed: a folder, a manifest, packed shards")


def _rows(clips: Sequence[Clip], source: str, bad: list[BadClip], cutter: Cutter, threads: int) -> list[Row]:
    """Rows of clips whose files are there, cut into spans; the others go to `bad`."""

    def rows_of(clip: Clip) -> list[Row] | ClipError:
        try:
            mark = mark_of(file_of(clip.path))
            pieces = cutter.cut(clip)
        except OSError as error:
            return ClipError("missing", error.strerror or str(error), clip.path)
        except ClipError as error:
            return error
        return [clip_row(piece, mark) for piece in pieces]

    mark_of = lru_cache(maxsize=1024)(_mark)  # many clips of one shard follow one another
    rows: list[Row] = []
    for first in range(0, len(clips), PROBED_AT_ONCE):
        block = [clips[index] for index in range(first, min(first + PROBED_AT_ONCE, len(clips)))]
        for clip, outcome in zip(block, map_in_threads(rows_of, block, threads), strict=True):
            if isinstance(outcome, ClipError):
                bad.append(BadClip(source, clip.id, clip.path, outcome.cause, outcome.message))
            else:
                rows += outcome
    return rows


def _mark(path: str) -> FileMark:
    return mark_file(path)


@dataclass(frozen=True)
class Cutter:
    """Cuts videos into spans, each a row of its own.

    Attributes:
        span_seconds: length of a span; None: no cuts at fixed times.
        scenes: cut where the scene changes.
        max_pixels: a larger frame is a bad clip.
    """

    span_seconds: float | None
    scenes: bool
    max_pixels: int

    def cut(self, clip: Clip) -> list[Clip]:
        """Spans of a video, from its beginning. A picture stays whole, and a video that nothing cuts.

        Raises:
            ClipError: the file cannot be read.
        """
        if clip.kind == "image" or not (self.scenes or self.span_seconds):
            return [clip]
        info = probe(clip.path, clip.kind, max_pixels=self.max_pixels)
        length = float(info.presentation_seconds[-1]) + 1 / info.frames_per_second
        start = clip.start_seconds or 0.0
        end = length if clip.end_seconds is None else min(clip.end_seconds, length)
        edges = [start, *(scene_cuts(clip.path, start, end) if self.scenes else []), end]
        if self.span_seconds is not None:
            edges = [time for pair in pairwise(edges) for time in equal_spans(*pair, self.span_seconds)] + [end]
        times = [round(time, 6) for time in edges[:-1]] + [math.ceil(end * 1000 - 1e-6) / 1000]
        return [
            replace(clip, id=f"{clip.id}@{first:g}-{last:g}", start_seconds=first, end_seconds=last)
            for first, last in pairwise(times)
        ]


def equal_spans(start: float, end: float, span_seconds: float) -> list[float]:
    """Where the spans of a stretch begin, seconds; a short rest belongs to the last span."""
    whole, rest = divmod(max(end - start, 0.0) / span_seconds, 1)
    count = max(1, int(whole) + (rest >= SHORTEST_REST))
    return [start + number * span_seconds for number in range(count)]
