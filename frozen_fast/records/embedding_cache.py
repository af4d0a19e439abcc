"""A cache of clip features on disk, keyed by their inputs.

    FOLDER/<digest of the settings>/<digest of the content>.safetensors

Everything below FOLDER is opened without following symbolic links. A file is named after the hash of its content, so
that truncated and damaged files are detected and several processes can write at the same time.

Axis letters: N clips of a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from frozen_fast.errors import UserError

log = logging.getLogger(__name__)

Entry = tuple[dict[str, Tensor], int]
"""(a clip's features with first axis 1, the number of windows that they were merged from)."""

KEY = "evaluation.embedding_cache"
_FOLDER, _FILE = re.compile(r"[0-9a-f]{64}"), re.compile(r"([0-9a-f]{64})\.safetensors")
_PREFIX = "feature."


def digest(values: Any) -> str:
    """Return the SHA-256 of values that JSON can represent."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class EmbeddingCache:
    """The entries of one combination of settings, all read when it is opened."""

    def __init__(self, folder: Path, settings: str) -> None:
        """Open the cache and read its entries.

        Args:
            folder: the cache; created if missing.
            settings: digest of everything except the clip that the features depend on.

        Raises:
            UserError: the folder or a folder in it is a symbolic link or cannot be used.
        """
        self._folder, self._settings = folder, settings
        self._entries: dict[str, Entry] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            root = _open_folder(folder)
            try:
                if not _exists(settings, root):
                    os.mkdir(settings, dir_fd=root)
                place = _open_folder(settings, root)
                try:
                    for name in sorted(os.listdir(place)):
                        if _FILE.fullmatch(name):
                            self._entries.update(_read(name, place))
                finally:
                    os.close(place)
            finally:
                os.close(root)
        except OSError as error:
            raise _unusable(folder, error) from None

    def get(self, key: str) -> Entry | None:
        """Return the entry of a clip's digest, or None."""
        return self._entries.get(key)

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Write new entries, whose features have the same names and shapes, as one file.

        Raises:
            UserError: the folder cannot be written.
        """
        if not entries:
            return
        features = [one for one, _ in entries.values()]
        tensors = {_PREFIX + name: torch.cat([one[name] for one in features]) for name in features[0]}
        tensors["keys"] = torch.tensor([list(bytes.fromhex(key)) for key in entries], dtype=torch.uint8)
        tensors["windows"] = torch.tensor([windows for _, windows in entries.values()], dtype=torch.int64)
        data = save(tensors)
        name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            root = _open_folder(self._folder)
            try:
                place = _open_folder(self._settings, root)
                try:
                    _write(name, data, place)
                finally:
                    os.close(place)
            finally:
                os.close(root)
        except OSError as error:
            raise _unusable(self._folder, error) from None
        self._entries.update(entries)


def shrink(folder: Path, most_bytes: int) -> None:
    """Delete the least recently used files until the rest has at most this size."""
    found = []
    for file in _files(folder):
        state = file.lstat()
        found.append((state.st_mtime_ns, state.st_size, file))
    excess = sum(size for _, size, _ in found) - most_bytes
    for _, size, file in sorted(found):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size


def _files(folder: Path) -> Iterator[Path]:
    for below in sorted(folder.iterdir()):
        if _FOLDER.fullmatch(below.name) and below.is_dir() and not below.is_symlink():
            yield from (file for file in below.iterdir() if _FILE.fullmatch(file.name) and not file.is_symlink())


def _read(name: str, place: int) -> dict[str, Entry]:
    """Return the entries of a file and mark it as used; a damaged file is deleted."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=place)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read()
    found = _FILE.fullmatch(name)
    assert found is not None
    try:
        if hashlib.sha256(data).hexdigest() != found.group(1):
            raise ValueError("its content does not match its name")
        tensors = load(data)
        keys = [bytes(row.tolist()).hex() for row in tensors.pop("keys")]
        windows = tensors.pop("windows").tolist()
    except (ValueError, KeyError, SafetensorError) as error:
        log.warning("embedding cache: %s cannot be used (%s) and is deleted", name, error)
        os.unlink(name, dir_fd=place)
        return {}
    os.utime(name, dir_fd=place, follow_symlinks=False)
    features = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return {
        key: ({name: tensor[row : row + 1] for name, tensor in features.items()}, windows[row])
        for row, key in enumerate(keys)
    }


def _write(name: str, data: bytes, place: int) -> None:
    temporary = f".{name}.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=place)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
    except OSError:
        os.unlink(temporary, dir_fd=place)
        raise


def _open_folder(path: str | Path, within: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)


def _exists(name: str, within: int) -> bool:
    try:
        os.stat(name, dir_fd=within, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _unusable(folder: Path, error: OSError) -> UserError:
    allowed = "a writable folder that neither is nor contains a symbolic link"
    return UserError(f"{KEY}: got {str(folder)!r} ({error.strerror or error}); allowed: {allowed}")
