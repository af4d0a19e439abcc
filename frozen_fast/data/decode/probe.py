"""Checks a file before decoding and reads its frame count, size and rate; results are cached."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from frozen_fast.data.decode.frame_index import ClipIndex, read_index
from frozen_fast.data.decode.pictures import read_picture_info
from frozen_fast.data.decode.types import ClipError, Kind, VideoInfo

_CACHE_ENTRIES = 1024  # some 4 KB each for a clip of 250 frames
_CacheKey = tuple[str, str, int, int, int]
_cache: OrderedDict[_CacheKey, VideoInfo | ClipIndex | ClipError] = OrderedDict()
_lock = Lock()


def probe(path: str | Path, kind: Kind, *, max_pixels: int) -> VideoInfo:
    """Find a clip's frames, size, rate and rotation.

    Reads packets only (and decodes the first frame) if they give the exact number of frames: H.264,
    HEVC, AV1, VP8, VP9 and Motion JPEG in MP4/MOV, Matroska/WebM and AVI. Other files are decoded once to count
    frames. The last thousand results are cached by path, size and modification time.

    Args:
        path: the file.
        kind: "video", or "image" for a picture, of which only the header is read.
        max_pixels: a frame with more pixels is refused before it is decoded.

    Raises:
        ClipError: the file is not a usable clip.
    """
    found = _lookup(path, kind, max_pixels)
    return found.info if isinstance(found, ClipIndex) else found


def clip_index(path: str | Path, *, max_pixels: int) -> ClipIndex:
    """A video's packets and frames, from the same cache as probe."""
    found = _lookup(path, "video", max_pixels)
    assert isinstance(found, ClipIndex)
    return found


def _lookup(path: str | Path, kind: Kind, max_pixels: int) -> VideoInfo | ClipIndex:
    name = os.fspath(path)
    status = _regular_file(name)
    cache_key = (name, kind, max_pixels, status.st_size, status.st_mtime_ns)
    with _lock:
        found = _cache.get(cache_key)
        if found is not None:
            _cache.move_to_end(cache_key)
    if found is None:
        try:
            found = _read(name, kind, max_pixels)
        except ClipError as error:
            if _is_transient(error):
                raise
            found = error
        with _lock:
            _cache[cache_key] = found
            while len(_cache) > _CACHE_ENTRIES:
                _cache.popitem(last=False)
    if isinstance(found, ClipError):
        raise ClipError(found.cause, found.message, name)
    return found


def _is_transient(error: BaseException) -> bool:
    """Whether the system refused to read (a disk, a network, no memory, no file handle): the file may be good."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, MemoryError)):
            return True
        cause = cause.__cause__
    return False


def _read(path: str, kind: Kind, max_pixels: int) -> VideoInfo | ClipIndex:
    try:
        if kind == "image":
            return read_picture_info(path, max_pixels=max_pixels)
        return read_index(path, max_pixels=max_pixels)
    except OSError as error:
        raise ClipError("decode_failed", f"cannot be read: {error.strerror or error}", path) from error


def _regular_file(path: str) -> os.stat_result:
    """Return the file's status; raise ClipError if it is not a non-empty regular file."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ClipError("missing", "no such file", path) from error
    except (OSError, ValueError) as error:
        raise ClipError("missing", f"cannot be looked at: {error}", path) from error
    if stat.S_ISDIR(status.st_mode):
        raise ClipError("directory", "a directory, not a file", path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block its reader
        raise ClipError("not_a_video", "not a regular file", path)
    if status.st_size == 0:
        raise ClipError("empty", "zero bytes", path)
    return status
