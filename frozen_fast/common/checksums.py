"""SHA-256 checksums of a folder's files, and JSON files that contain their own checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_json

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_NO_DIGEST = "0" * 64
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n\}\n\Z')


def file_digest(path: Path, *, from_disk: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: the file.
        from_disk: drop the file's pages from the cache first to read from disk, if the system allows it.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk:
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write manifest.json: name -> {"bytes", "sha256"} of every file below a folder.

    Args:
        folder: a finished folder.
        without: file names to exclude (files that change later).
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and name not in without:
            files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def find_damage(folder: Path, names: Collection[str] | None = None, *, from_disk: bool = False) -> str | None:
    """Compare a folder's files with its manifest.json.

    Args:
        folder: holds manifest.json.
        names: check only these files of the manifest; None: all.
        from_disk: as for file_digest.

    Returns:
        What is wrong with the first file that differs ("model.safetensors is missing"); None: nothing.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, digest) in wanted.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if file_digest(path, from_disk=from_disk) != digest:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def seal(values: dict[str, Any]) -> bytes:
    """Return values as JSON text whose last key, sha256, is the checksum of the text with 64 zeros in its place."""
    text = (json.dumps({**values, "sha256": _NO_DIGEST}, indent=2) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    head, _, tail = text.rpartition(_NO_DIGEST.encode())
    return head + digest + tail


def is_sealed(data: bytes) -> bool:
    """Return whether data is what seal() returned, unchanged."""
    found = _SEAL.search(data)
    if found is None:
        return False
    bare = data[: found.start(1)] + _NO_DIGEST.encode() + data[found.end(1) :]
    return hashlib.sha256(bare).hexdigest().encode() == found.group(1)
