"""Atomic file writes and JSON-lines files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, says that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__
    return False


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def links_outside(folder: Path) -> Iterator[Path]:
    """Give the symbolic links below a folder that lead out of it, at any depth; the folder itself may be a link."""
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                yield path


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock file, made where it is missing, and change nothing in it.

    Raises:
        OSError: it cannot be opened, or is a symbolic link.
    """
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def overwrite(path: Path, content: str) -> None:
    """Write a short file in place, padded with spaces to its current size; needs no space on a full disk.

    A kill can leave a damaged file; use it only after write_atomically has failed.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        data = content.encode()
        _write_all(descriptor, data + b" " * (os.fstat(descriptor).st_size - len(data)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Append text completely or not at all: a partial write to a full disk is truncated.

    Raises:
        OSError: nothing was appended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, text.encode())
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def append_json_line(path: Path, value: Any) -> None:
    """Append one value as one JSON line, completely or not at all."""
    append_text(path, json.dumps(value) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; drops an incomplete last line, raises for any other invalid line."""
    rows, problems = read_rows(path)
    if problems and problems[0][0] <= path.read_bytes().rstrip().count(b"\n"):
        raise ValueError(f"line {problems[0][0]}: {problems[0][1]}")
    return rows


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Read the valid lines of a JSON-lines file of objects.

    Returns:
        (the objects, (line number from 1, the problem) of each invalid line). A missing file has no lines.
    """
    rows: list[dict[str, Any]] = []
    problems: list[tuple[int, str]] = []
    if not path.exists():
        return rows, problems
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append((number, getattr(error, "msg", None) or type(error).__name__))
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append((number, "not a JSON object"))
    return rows, problems


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
