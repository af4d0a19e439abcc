"""Decodes frames with PyAV from the nearest key frame, for every codec of FFmpeg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from frozen_fast.data.decode.frame_index import ClipIndex, opened
from frozen_fast.data.decode.types import ClipError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream


def read_frames(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Read frames by number.

    Args:
        path: the file.
        index: its index.
        frame_indices: distinct, ascending.
        max_pixels: larger frames are refused.

    Returns:
        uint8 [N, H, W, 3] RGB, upright.

    Raises:
        ClipError: decode_failed if a frame is missing, damaged or of another size.
    """
    with opened(path, max_pixels=max_pixels) as (container, stream):
        from av.video.reformatter import VideoReformatter

        if index.seekable:
            pictures = _by_time(container, stream, path, index, frame_indices)
        else:
            pictures = _by_counting(container, stream, path, frame_indices)
        converter = VideoReformatter()  # one for all frames: making one costs more than using it
        frames = [_to_rgb(frame, converter, path, index) for frame in pictures]
    if len(frames) != len(frame_indices):
        raise ClipError("decode_failed", f"{len(frames)} of {len(frame_indices)} frames decode", path)
    return np.stack(frames)


def _by_counting(
    container: InputContainer, stream: VideoStream, path: str, frame_indices: Sequence[int]
) -> Iterator[VideoFrame]:
    wanted = set(frame_indices)
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            yield _sound(frame, path)
        if number >= frame_indices[-1]:
            return


def _by_time(
    container: InputContainer, stream: VideoStream, path: str, index: ClipIndex, frame_indices: Sequence[int]
) -> Iterator[VideoFrame]:
    """Decode each run of frames that share a key frame once, skipping the packets before it."""
    runs: list[tuple[int, list[int]]] = []
    for frame in frame_indices:
        key_packet = index.packet_range(frame)[0]
        if not runs or runs[-1][0] != key_packet:
            runs.append((key_packet, []))
        runs[-1][1].append(frame)
    at_start = True
    for key_packet, frames in runs:
        wanted = [int(index.frame_pts[frame]) for frame in frames]
        key_pts = int(index.packet_pts[key_packet])
        if key_packet > 0 or not at_start:
            seek(container, stream, key_pts)
        at_start = False
        packets = packets_from(container, stream, path, key_pts, int(index.packet_pts.min()))
        yield from _run(packets, path, wanted)


def seek(container: InputContainer, stream: VideoStream, pts: int) -> None:
    """Go to the key frame with this time, or to one before it."""
    container.seek(pts, stream=stream, backward=True, any_frame=False)


def _run(packets: Iterator[av.Packet], path: str, wanted: list[int]) -> Iterator[VideoFrame]:
    """The frames with these times, decoding from the key frame's packet on; times may run out of order."""
    missing = set(wanted)
    found: dict[int, VideoFrame] = {}
    for packet in packets:
        for frame in packet.decode():
            if frame.pts in missing:
                missing.remove(frame.pts)
                found[frame.pts] = _sound(frame, path)
        if not missing:
            yield from (found[pts] for pts in wanted)
            return
    raise ClipError("decode_failed", "a frame is missing: its packet is damaged", path)


def packets_from(
    container: InputContainer, stream: VideoStream, path: str, key_pts: int, first_pts: int
) -> Iterator[av.Packet]:
    """Packets from the key frame's on, the empty one at the end included.

    A demuxer that overshot (seeking goes by decoding time) is rewound to first_pts once.
    """
    for attempt in (1, 2):
        started = False
        for packet in container.demux(stream):
            if not started and packet.size == 0:
                break  # the end, and no such key frame on the way
            started = started or packet.pts == key_pts
            if started:
                yield packet
        if started:
            return
        if attempt == 1:
            seek(container, stream, first_pts)
    raise ClipError("decode_failed", "the key frame cannot be found again", path)


def _sound(frame: VideoFrame, path: str) -> VideoFrame:
    if frame.is_corrupt:
        raise ClipError("decode_failed", "a frame is damaged", path)
    return frame


def _to_rgb(frame: VideoFrame, converter: VideoReformatter, path: str, index: ClipIndex) -> np.ndarray:
    if (frame.height, frame.width) != (index.stored_height, index.stored_width):
        raise ClipError("decode_failed", f"the frame size changes to {frame.width} x {frame.height}", path)
    rgb = converter.reformat(frame, format="rgb24", threads=1)  # otherwise a thread per core for each frame
    return upright(rgb.to_ndarray(), index.info.rotation_degrees)


def upright(frame_HWC: np.ndarray, rotation_degrees: int) -> np.ndarray:
    """Turn a frame clockwise by 0, 90, 180 or 270 degrees."""
    return np.rot90(frame_HWC, -(rotation_degrees // 90)) if rotation_degrees else frame_HWC
