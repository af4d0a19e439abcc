"""Manifests: JSON lines with one clip per line. A malformed line is an error with its number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, read_text
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError, unknown_name

_KINDS = ("video", "image")
_SPLITS = ("train", "val", "test")
_KEYS = ("id", "path", "captions", "kind", "start_seconds", "end_seconds", "split", "twin", "label")
_SHOWN_CHARACTERS = 80
_TEXT_RULE = "a non-empty string without NUL characters or lone surrogates"
_MOST_SECONDS = 1e9


def read_manifest(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Read the clips of a manifest file; if its lines have splits, only those of config.split.

    Raises:
        UserError: file:line, field, value and what is allowed, for the first malformed line.
    """
    path = Path(config.path)
    if not path.is_file():
        raise UserError(f"{key}.path: got {config.path!r}, which is not a file; allowed: a manifest file (JSON lines)")
    clips = _read_lines(path)
    if not clips:
        raise UserError(f"{path}: got no lines; allowed: one clip per line")
    yield from _of_split(clips, config.split, path, key, collector)


def _read_lines(path: Path) -> list[Clip]:
    lines: dict[str, int] = {}
    clips = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        clip = parse_line(line, f"{path}:{number}", path.parent)
        if clip.id in lines:
            known = f"already on line {lines[clip.id]}"
            raise UserError(f"{path}:{number}: id: got {_shown(clip.id)}, {known}; allowed: unique")
        lines[clip.id] = number
        clips.append(clip)
    _check_twins(clips, lines, path)
    return clips


def _check_twins(clips: list[Clip], lines: dict[str, int], path: Path) -> None:
    for clip in clips:
        if clip.twin is not None and (clip.twin not in lines or clip.twin == clip.id):
            where = f"{path}:{lines[clip.id]}"
            raise UserError(f"{where}: twin: got {_shown(clip.twin)}; allowed: the id of another line of this manifest")


def _of_split(clips: list[Clip], split: str, path: Path, key: str, collector: ClipCollector) -> list[Clip]:
    """The clips of one split; all of them if no line has a split. A split that looks misspelled is counted."""
    splits = {clip.split for clip in clips}
    if not split or splits == {""}:
        return clips
    if "" in splits:
        example = next(clip.id for clip in clips if not clip.split)
        raise UserError(f"{path}: split: missing for id {example!r}; allowed: on every line, or on none")
    if split not in splits:
        raise unknown_name(f"{key}.split", split, splits)
    misspelt = set(get_close_matches(split, splits - {split, *_SPLITS}))
    for clip in clips:
        if clip.split in misspelt:
            collector.drop(f"split {clip.split!r} (did you mean {split!r}?)", clip.id)
    return [clip for clip in clips if clip.split == split]


def parse_line(line: str, where: str, folder: Path) -> Clip:
    """Parse one manifest line; relative paths are relative to the manifest's folder.

    Args:
        line: the JSON text.
        where: "file:line", for the error.
        folder: the manifest's folder.
    """
    try:
        row = json.loads(line, object_pairs_hook=partial(_unique_keys, where=where))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise UserError(
            f"{where}: not JSON ({getattr(error, 'msg', type(error).__name__)}): {_shown(line)}; "
            "allowed: one JSON object per line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: got {_shown(row)}; allowed: a JSON object")
    for name in row:
        if name not in _KEYS:
            raise unknown_name(f"{where}: key", name, _KEYS)
    kind = _text(row, "kind", where)
    if kind not in _KINDS:
        raise unknown_name(f"{where}: kind", kind, _KINDS)
    start, end = _seconds(row, "start_seconds", where), _seconds(row, "end_seconds", where)
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end_seconds: got {end:g}; allowed: above start_seconds ({start or 0.0:g})")
    return Clip(
        id=_text(row, "id", where),
        path=str(folder / _text(row, "path", where)),
        captions=_captions(row, where),
        kind="image" if kind == "image" else "video",
        start_seconds=start,
        end_seconds=end,
        split=_text(row, "split", where) if row.get("split") is not None else "",
        twin=_text(row, "twin", where) if row.get("twin") is not None else None,
        label=_text(row, "label", where) if row.get("label") is not None else None,
    )


def _unique_keys(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object's keys and values; a repeated key is an error."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in [other for other, _ in pairs[:index]])
        raise UserError(f"{where}: key: got {_shown(twice)} twice; allowed: each key once")
    return row


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not _is_text(value):
        got = _shown(value) if name in row else "nothing"
        raise UserError(f"{where}: {name}: got {got}; allowed: {_TEXT_RULE}")
    return value


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a non-empty string that a file name and a tokenizer can handle."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and "\0" not in value
        and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _captions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("captions")
    if not isinstance(value, list) or not value or not all(_is_text(text) for text in value):
        got = _shown(value) if "captions" in row else "nothing"
        raise UserError(f"{where}: captions: got {got}; allowed: a list with at least one of {_TEXT_RULE}")
    return tuple(text.strip() for text in value)


def _seconds(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST_SECONDS
    if not fits:
        raise UserError(f"{where}: {name}: got {_shown(value)}; allowed: seconds, from 0 to {_MOST_SECONDS:g}")
    return float(value)


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        value = value[:_SHOWN_CHARACTERS] + ".."  # repr() of a long line would take its memory again
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + ".."


MANIFEST = Layout(data_set="a manifest", read=read_manifest)
