"""Copies the packets that a few frames need to a small file in memory, without decoding.

DALI decodes a file from its start to the last frame asked for. An excerpt contains only the groups of
pictures with wanted frames, each from its key frame to the last wanted frame.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from frozen_fast.data.decode.frame_index import ClipIndex, opened
from frozen_fast.data.decode.pyav import packets_from, seek
from frozen_fast.data.decode.types import ClipError

_LARGE_FILE_BYTES = 32 * 1024 * 1024


class Excerpt(NamedTuple):
    """An encoded file in memory and the indices of the wanted frames in it."""

    encoded: np.ndarray  # [bytes] uint8
    frame_indices: np.ndarray  # [N] int32
    num_frames: int  # that decode from it


def packet_runs(index: ClipIndex, frame_indices: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of packets (first, last inclusive, decoding order) that the frames need, joined where they overlap."""
    runs: list[tuple[int, int]] = []
    for first, last in sorted({index.packet_range(frame) for frame in frame_indices}):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], last))
        else:
            runs.append((first, last))
    return runs


def whole_file(path: str, num_frames: int, frame_indices: Sequence[int]) -> Excerpt:
    """The unchanged file."""
    return Excerpt(np.fromfile(path, np.uint8), np.array(frame_indices, np.int32), num_frames)


def excerpt(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> Excerpt:
    """Copy the packets that some frames need into a Matroska file in memory.

    Args:
        path: the file.
        index: its index; seekable.
        frame_indices: any order, repeats allowed.
        max_pixels: as for the other readers.

    Raises:
        ClipError: decode_failed if the packets cannot be found again.
    """
    import av

    runs = packet_runs(index, frame_indices)
    kept: list[int] = []
    target = io.BytesIO()
    with opened(path, max_pixels=max_pixels) as (container, stream):
        with av.open(target, "w", format="matroska") as output:
            copy = output.add_stream_from_template(stream)
            first_pts = int(index.packet_pts.min())
            for number, (first, last) in enumerate(runs):
                key_pts = int(index.packet_pts[first])
                if first > 0 or number > 0:
                    seek(container, stream, key_pts)
                packets = packets_from(container, stream, path, key_pts, first_pts)
                for position, packet in zip(range(first, last + 1), packets, strict=False):
                    if packet.pts != index.packet_pts[position]:
                        raise ClipError("decode_failed", "the file changed while it was read", path)
                    if index.packet_pts[position] < key_pts:
                        continue  # a leading B-frame, which cannot be decoded from this key frame
                    kept.append(position)
                    packet.stream = copy
                    output.mux(packet)
    # the excerpt has no edit list, so frames that the file's own list hides are seen in it
    times = np.sort(index.packet_pts[kept][index.packet_yields[kept]])
    where = np.searchsorted(times, index.frame_pts[list(frame_indices)])
    return Excerpt(np.frombuffer(target.getbuffer(), np.uint8), where.astype(np.int32), len(times))


def cheapest(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int, saving: int) -> Excerpt:
    """The unchanged file, or an excerpt if it saves decoding at least `saving` frames or is required.

    It is required if the file's packets are not its frames (edit lists), or if the file is too large for memory.
    """
    if not index.plain or os.path.getsize(path) > _LARGE_FILE_BYTES:
        return excerpt(path, index, frame_indices, max_pixels)
    decoded = sum(last + 1 - first for first, last in packet_runs(index, frame_indices))
    if max(frame_indices) + 1 - decoded >= saving:
        return excerpt(path, index, frame_indices, max_pixels)
    return whole_file(path, index.info.num_frames, frame_indices)
