"""Shared helpers of the readers: metadata files, existence checks, counts of dropped rows."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.sources.clip import Clip
from frozen_fast.errors import UserError

logger = logging.getLogger(__name__)

_EXAMPLES_IN_LOG = 3
NOT_ON_DISK = "file not on disk"
DUPLICATE_ID = "duplicate id"
NO_CAPTION = "no caption"


class MissingFileError(UserError):
    """A folder or annotation file of a data set is missing; read_source adds its origin to the message."""


def require_folder(path: Path, key: str) -> Path:
    """Return the path; raise MissingFileError with the config key if it is not a folder."""
    if not path.is_dir():
        got = f"got {str(path)!r}, which is not a folder"
        raise MissingFileError(f"{key}.path: {got}; allowed: the data set's root folder")
    return path


def require_file(path: Path, key: str) -> Path:
    """Return the path; raise MissingFileError if it is not a file."""
    if not path.is_file():
        missing = f"the metadata file {str(path)!r} does not exist"
        raise MissingFileError(f"{key}.path: {missing}; allowed: a folder that contains it")
    return path


def folder_with(root: Path, folders: Iterable[str], holds: str, key: str) -> Path:
    """Return the first of several folders below the root that contains a file or folder.

    Args:
        root: the data set's folder.
        folders: relative to it, "." is the root itself.
        holds: name of the file or folder that it must contain; ".": nothing.
        key: the source's config key.

    Raises:
        MissingFileError: none of them does; the message lists all.
    """
    require_folder(root, key)
    places = [Path(folder) / holds for folder in folders]
    for place in places:
        if (root / place).exists():
            return (root / place).parent if holds != "." else root / place
    wanted = ", ".join(str(place) for place in places)
    raise MissingFileError(
        f"{key}.path: got {str(root)!r}, which contains none of: {wanted}; allowed: a folder with one of them"
    )


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; raise UserError with its name if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; allowed: UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; raise UserError with file and line if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); allowed: one JSON value") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None


def read_list(path: Path) -> list[str]:
    """The non-empty lines of a list file, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_table(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of a comma-separated file with a header, as {column: stripped text} of the columns asked for.

    A cell that a short row lacks reads as empty; a column that the header lacks is a UserError naming it.
    """
    wanted = list(columns)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in wanted if name not in header]
            if missing:
                raise UserError(f"{path}: missing column {', '.join(missing)}; got: {', '.join(header) or 'no header'}")
            places = [(name, header.index(name)) for name in wanted]
            for row in reader:
                if row:
                    yield {name: row[place].strip() if place < len(row) else "" for name, place in places}
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; allowed: UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a comma-separated table ({error})") from None


def records(data: Any, field: str, columns: Iterable[str], path: Path) -> list[dict[str, Any]]:
    """data[field] (data itself where field is empty) as a list of objects with string columns.

    Raises:
        UserError: naming the file, the place and the value where a column is missing or no string.
    """
    rows = data if not field else data.get(field) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        wanted = f"a list of objects with {', '.join(columns)}"
        raise UserError(f"{path}: {field or 'top level'}: missing; allowed: {wanted}")
    for number, row in enumerate(rows):
        for column in columns:
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                got = row.get(column) if isinstance(row, dict) else row
                raise UserError(f"{path}: {field}[{number}].{column}: got {got!r:.80}; allowed: a string")
    return rows


class FolderListings:
    """Checks whether files exist by listing each folder once, which is fast for millions of rows."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        return name in self._names[folder]

    @staticmethod
    def _list(folder: str) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return frozenset()


def _file_of(clip: Clip) -> str:
    """The file of the clip; for a packed clip, its shard."""
    where = parse_address(clip.path)
    return clip.path if where is None else where.file


class ClipCollector:
    """Keeps usable clips and counts dropped rows by cause.

    Attributes:
        drops: cause -> number of dropped rows.
        listed: different clip ids that the annotation names, on disk or not.
        classes: a reader of an action recognition data set puts the names of its class list here.
    """

    def __init__(self) -> None:
        self.drops: Counter[str] = Counter()
        self.listed = 0
        self.classes: Sequence[str] = ()
        self._examples: dict[str, list[str]] = {}
        self._seen: set[str] = set()
        self._listings = FolderListings()

    def drop(self, cause: str, example: str) -> None:
        """Count one dropped row."""
        self.drops[cause] += 1
        examples = self._examples.setdefault(cause, [])
        if len(examples) < _EXAMPLES_IN_LOG:
            examples.append(example)

    def keep(self, clip: Clip) -> bool:
        """Whether the clip is usable: its id is new, it has a caption, and its file exists. Otherwise count it."""
        if clip.id in self._seen:
            self.drop(DUPLICATE_ID, clip.id)
            return False
        self._seen.add(clip.id)
        self.listed += 1
        if not clip.captions:
            self.drop(NO_CAPTION, clip.id)
        elif _file_of(clip) not in self._listings:
            self.drop(NOT_ON_DISK, clip.path)
        else:
            return True
        return False

    def log(self, name: str, kept: int) -> None:
        """Log the number of dropped rows."""
        for cause, count in self.drops.items():
            examples = ", ".join(self._examples[cause])
            logger.warning(
                "source %s: dropped %d rows: %s (%s%s); %d clips kept",
                name,
                count,
                cause,
                examples,
                ", .." if count > _EXAMPLES_IN_LOG else "",
                kept,
            )
