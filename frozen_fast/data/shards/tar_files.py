"""Reads parts of shards with pread, so that threads and forked processes can share a descriptor."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from frozen_fast.data.decode.types import ClipError

MOST_OPEN = 512
"""Open shards per decoder; the limit of open files must be twice as high."""


class _OpenFile:
    """A descriptor and its number of readers."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0


class ShardFiles:
    """Keeps the most recently used shards open; a shard in use is closed after its reads."""

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = most_open if limit == resource.RLIM_INFINITY else max(1, min(most_open, limit // 2))
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def opened(self, path: str, expected_bytes: int) -> Iterator[int]:
        """A descriptor of a shard, valid inside the block.

        Raises:
            ClipError: missing, a directory, shorter (truncated) or longer than the index says.
        """
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(_opened(path, expected_bytes))
            self._files.move_to_end(path)
            file.users += 1
            self._shrink(self._most_open)
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def _shrink(self, most_open: int) -> None:
        idle = [path for path, file in self._files.items() if file.users == 0] if len(self._files) > most_open else []
        for path in idle[: len(self._files) - most_open]:
            os.close(self._files.pop(path).descriptor)

    def close(self) -> None:
        """Close all shards that are not in use."""
        with self._lock:
            self._shrink(0)

    def __len__(self) -> int:
        return len(self._files)


def _opened(path: str, expected_bytes: int) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise ClipError("missing", "no such shard", path) from error
    except OSError as error:
        raise ClipError("decode_failed", f"cannot be opened: {error.strerror or error}", path) from error
    size = os.fstat(descriptor).st_size
    if size != expected_bytes:
        os.close(descriptor)
        message = f"the shard has {size} bytes, its index says {expected_bytes}"
        raise ClipError("truncated" if size < expected_bytes else "decode_failed", message, path)
    return descriptor


def advise(descriptor: int, offset: int, length: int) -> None:
    """Ask for bytes that will be read soon, so that the disk can prefetch; does not wait."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def read_exactly(descriptor: int, offset: int, length: int, path: str) -> memoryview:
    """Bytes of a file, in memory that may be written to.

    Raises:
        ClipError: truncated, if the file is too short; decode_failed, for a read error.
    """
    size = os.fstat(descriptor).st_size
    if offset + length > size:  # a damaged table may ask for more than memory holds
        raise ClipError("truncated", f"the shard ends at byte {size}, before the frame does", path)
    buffer = bytearray(length)
    view = memoryview(buffer)
    done = 0
    while done < length:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ClipError("decode_failed", f"cannot be read: {error.strerror or error}", path) from error
        if count == 0:
            raise ClipError("truncated", f"the shard ends at byte {offset + done}, before the frame does", path)
        done += count
    return view
