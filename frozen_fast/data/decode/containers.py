"""Checks a video file's container structure from its element headers, to detect truncated and damaged files.

FFmpeg's demuxers read a truncated file without an error, so its clip would silently be too short.
Sources: Matroska (RFC 9559, RFC 8794 for EBML) and the ISO base media file format (ISO 14496-12).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from frozen_fast.data.decode.types import Cause


class Fault(NamedTuple):
    """What is wrong with a file's structure."""

    cause: Cause
    message: str


_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# SeekHead, Info, Tracks, Cluster, Cues, Tags, Chapters, Attachments, Void, CRC-32
_SEGMENT_CHILDREN = frozenset(
    (0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0xEC, 0xBF)
)
# Timestamp, SimpleBlock, BlockGroup, Position, PrevSize, SilentTracks, EncryptedBlock, Void, CRC-32
_CLUSTER_CHILDREN = frozenset((0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, 0xAF, 0xEC, 0xBF))
_UNKNOWN_SIZE = -1
_KNOWN_STARTS = {b"\x1a\x45\xdf\xa3": "Matroska", b"OggS": "Ogg", b"FLV\x01": "FLV", b"\x30\x26\xb2\x75": "ASF"}
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"uuid", b"meta")


def container_name(path: str) -> str | None:
    """Return the container's name by a file's first bytes, None for other files."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "AVI"
    if start[4:8] in _MOV_BOXES:
        return "MP4"
    return _KNOWN_STARTS.get(start[:4])


def structure_fault(path: str) -> Fault | None:
    """Find a truncation or an invalid element in a Matroska/WebM, MP4/MOV or AVI file.

    Args:
        path: a regular file that is not empty.

    Returns:
        The fault, or None (also for other containers).
    """
    name = container_name(path)
    check = {"Matroska": _matroska_fault, "MP4": _mp4_fault, "AVI": _avi_fault}.get(name or "")
    if check is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return check(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _element(descriptor: int, offset: int) -> tuple[int, int, int] | None:
    """An EBML element's (id, offset of its data, size of its data); None where no header can be read."""
    head = os.pread(descriptor, 12, offset)
    if not head or head[0] < 0x10:
        return None
    id_length = 9 - head[0].bit_length()
    if len(head) <= id_length or head[id_length] == 0:
        return None
    size_length = 9 - head[id_length].bit_length()
    data = id_length + size_length
    if len(head) < data:
        return None
    value_bits = 7 * size_length
    size = int.from_bytes(head[id_length:data], "big") & ((1 << value_bits) - 1)
    if size == (1 << value_bits) - 1:
        size = _UNKNOWN_SIZE
    return int.from_bytes(head[:id_length], "big"), offset + data, size


def _matroska_fault(descriptor: int, size: int) -> Fault | None:
    header = _element(descriptor, 0)
    offset = header[1] + header[2] if header is not None else 0
    segment = _element(descriptor, offset)
    if segment is None or segment[0] != _SEGMENT:
        return Fault("truncated" if offset >= size else "decode_failed", "no Matroska segment after the header")
    _, offset, length = segment
    end = size if length == _UNKNOWN_SIZE else offset + length
    if end > size:
        return Fault("truncated", f"the Matroska segment claims {end} bytes, the file has {size}")
    while offset < end:
        element = _element(descriptor, offset)
        if element is None or element[0] not in _SEGMENT_CHILDREN:
            return _nonsense(offset, end, size)
        identity, data, length = element
        if identity == _CLUSTER:
            after = _after_cluster(descriptor, data, length, end, size)
            if isinstance(after, Fault):
                return after
            offset = after
        elif length == _UNKNOWN_SIZE or data + length > end:
            return _overrun(data, end, size)
        else:
            offset = data + length
    return None


def _after_cluster(descriptor: int, offset: int, length: int, end: int, size: int) -> int | Fault:
    """Walk a cluster's children; the offset after it, which for one of unknown size is where no child follows."""
    limit = end if length == _UNKNOWN_SIZE else offset + length
    if limit > end:
        return _overrun(offset, end, size)
    while offset < limit:
        element = _element(descriptor, offset)
        if element is None:
            return _nonsense(offset, limit, size)
        identity, data, child_length = element
        if identity not in _CLUSTER_CHILDREN:
            ends_here = length == _UNKNOWN_SIZE and identity in _SEGMENT_CHILDREN
            return offset if ends_here else _nonsense(offset, limit, size)
        if child_length == _UNKNOWN_SIZE or data + child_length > limit:
            return _overrun(data, limit, size)
        offset = data + child_length
    return offset


def _nonsense(offset: int, limit: int, size: int) -> Fault:
    cut = limit == size and size - offset < 12
    return Fault("truncated" if cut else "decode_failed", f"no Matroska element that belongs there at byte {offset}")


def _overrun(offset: int, limit: int, size: int) -> Fault:
    cause: Cause = "truncated" if limit == size else "decode_failed"
    return Fault(cause, f"the Matroska element at byte {offset} ends after its parent element")


def _mp4_fault(descriptor: int, size: int) -> Fault | None:
    offset, has_index = 0, False
    while offset + 8 <= size:
        head = os.pread(descriptor, 16, offset)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = size - offset
        has_index = has_index or name in (b"moov", b"moof")
        if offset + length > size and name in _MOV_BOXES:
            return Fault(
                "truncated", f"the MP4 box {name.decode()!r} ends at byte {offset + length}, the file at {size}"
            )
        if length < 8 or offset + length > size:
            break  # trailing bytes that are no box; players ignore them too
        offset += length
    if not has_index:
        return Fault("truncated", "the MP4 file has no index (moov box)")
    return None


def _avi_fault(descriptor: int, size: int) -> Fault | None:
    claimed = int.from_bytes(os.pread(descriptor, 4, 4), "little") + 8
    unknown = claimed == 8 or claimed > 0xFFFFFFF0  # written live
    if claimed > size and not unknown:
        return Fault("truncated", f"the AVI header claims {claimed} bytes, the file has {size}")
    return None


def avi_dropped_frames(path: str) -> int:
    """Count an AVI's dropped frames: entries of size 0 in its index, which repeat the previous frame.

    Recorders write them for late frames; FFmpeg's demuxer skips them.
    """
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"idx1":
                entries = file.read(length)
                return sum(
                    entries[at + 2 : at + 4] in (b"dc", b"db") and entries[at + 12 : at + 16] == b"\0\0\0\0"
                    for at in range(0, len(entries) - 15, 16)
                )
            file.seek(length + (length & 1), os.SEEK_CUR)
    return 0
