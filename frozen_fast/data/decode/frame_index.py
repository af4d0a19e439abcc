"""Frame index of a video file, from its packets without decoding if that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from frozen_fast.data.decode.containers import avi_dropped_frames, container_name, structure_fault
from frozen_fast.data.decode.types import ClipError, VideoInfo
from frozen_fast.errors import UserError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg also reads playlists, pictures and text as "video", some of them opening other files: only these may be.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,h264,hevc,m4v,mpegvideo,mxf,rm,obu,"
    "wav,mp3,flac,aac,aiff"  # audio: opened to be told apart from what is no media at all
)
# One non-empty packet is one frame in these containers, hidden frames apart (the others are decoded to be counted).
_COUNTABLE_CONTAINERS = ("mov", "matroska", "avi")
_CODEC_NAMES = {"libvpx": "vp8", "libvpx-vp9": "vp9", "libdav1d": "av1", "libaom-av1": "av1"}
_COUNTABLE_CODECS = frozenset(("h264", "hevc", "av1", "vp8", "vp9", "mjpeg"))


@dataclass(frozen=True)
class ClipIndex:
    """The packets of a file's video stream.

    Attributes:
        info: frame count, rate and size.
        stored_height: pixels as stored, before the rotation tag.
        stored_width: likewise.
        frame_pts: [num_frames] int64, ascending: each frame's time in the stream's unit.
        packet_pts: [num_packets] int64, in decoding order; frames that are never shown included.
        packet_is_key: [num_packets] bool: decoding can start here.
        packet_yields: [num_packets] bool: decoding it gives a picture, which an edit list may still hide.
        seekable: every frame has a time of its own, so that it can be found from the nearest key frame.
            False: frames are counted from the start.
        plain: the frames are exactly the file's packets: nothing hidden, nothing cut away by an edit list.
    """

    info: VideoInfo
    stored_height: int
    stored_width: int
    frame_pts: np.ndarray = field(repr=False)
    packet_pts: np.ndarray = field(repr=False)
    packet_is_key: np.ndarray = field(repr=False)
    packet_yields: np.ndarray = field(repr=False)
    seekable: bool
    plain: bool

    def packet_range(self, frame: int) -> tuple[int, int]:
        """Packets (first, last inclusive, in decoding order) from the key frame needed to the frame's own."""
        last = int(np.flatnonzero(self.packet_pts == self.frame_pts[frame])[-1])
        keys = np.flatnonzero(self.packet_is_key[: last + 1])
        keys = keys[self.packet_pts[keys] <= self.frame_pts[frame]]  # a leading B-frame needs the key frame before
        return (int(keys[-1]) if len(keys) else 0), last


def av_missing() -> str | None:
    """Why PyAV, which indexes the frames for every backend, cannot be used, or None."""
    try:
        import av  # noqa: F401
    except (ImportError, OSError) as error:
        return f"PyAV, which finds the frames of every video, cannot be imported ({error})"
    return None


@contextmanager
def opened(
    path: str, *, max_pixels: int, options: dict[str, str] | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file's first video stream; one decoding thread, frames above max_pixels refused.

    Raises:
        ClipError: not_a_video, truncated or no_frames; FFmpeg's errors inside the block become decode_failed.
        UserError: PyAV is not installed.
    """
    reason = av_missing()
    if reason is not None:
        raise UserError(
            f"data.decode: got {path}, but {reason}; allowed: pictures only, or videos after pip install av"
        )
    import av
    from av.stream import Disposition
    from av.video.stream import VideoStream

    try:
        container = av.open(path, container_options={"format_whitelist": _FORMATS, **(options or {})})
    except (av.error.FFmpegError, ValueError) as error:
        raise _unopened(path, error) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise ClipError("no_frames", "the file has no video stream", path)
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        try:
            yield container, stream
        except (av.error.FFmpegError, OverflowError) as error:
            raise ClipError("decode_failed", _one_line(error), path) from error


def _unopened(path: str, error: Exception) -> ClipError:
    """Why FFmpeg could not open a file."""
    name = container_name(path)
    if name is None:
        return ClipError("not_a_video", "neither a video container nor one that is allowed", path)
    fault = structure_fault(path)
    if fault is not None:
        return ClipError(fault.cause, fault.message, path)
    return ClipError("decode_failed", f"starts like {name} but cannot be opened: {_one_line(error)}", path)


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]


@dataclass
class _Packets:
    """A video stream's packets, as the demuxer tells them, and its first frame."""

    codec: str
    container_format: str
    header_frames: int
    time_base: float
    rate: float
    first: VideoFrame | None = None
    pts: list[int | None] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    yields: list[bool] = field(default_factory=list)
    is_visible: list[bool] = field(default_factory=list)
    count: int = 0  # empty packets (an AVI's repeated frames) included


def read_index(path: str, *, max_pixels: int) -> ClipIndex:
    """Index a video file that exists and is not empty.

    Raises:
        ClipError: with any cause except missing, directory, empty and timeout.
    """
    try:
        packets = _demux(path, max_pixels)
    except ClipError as error:
        fault = structure_fault(path) if error.cause == "decode_failed" else None
        if fault is not None:  # says more than the decoder's complaint
            raise ClipError(fault.cause, fault.message, path) from error
        raise
    _check_whole(path, packets, max_pixels)
    first = packets.first
    if first is None:
        raise ClipError("no_frames", "no frame of the video stream decodes", path)
    frame_pts, seconds, seekable = _frame_times(path, packets, max_pixels)
    rotation = (360 - round(first.rotation / 90) * 90) % 360  # FFmpeg's angle is counter-clockwise
    turned = rotation in (90, 270)
    span = float(seconds[-1])
    info = VideoInfo(
        num_frames=len(frame_pts),
        frames_per_second=(len(frame_pts) - 1) / span if span > 0 else packets.rate,
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        codec=packets.codec,
        rotation_degrees=rotation,
        presentation_seconds=seconds,
    )
    return ClipIndex(
        info=info,
        stored_height=first.height,
        stored_width=first.width,
        frame_pts=frame_pts,
        packet_pts=np.array([0 if time is None else time for time in packets.pts], np.int64),
        packet_is_key=np.array(packets.is_key, bool),
        packet_yields=np.array(packets.yields, bool),
        seekable=seekable,
        plain=seekable and len(frame_pts) == len(packets.pts),
    )


def _demux(path: str, max_pixels: int) -> _Packets:
    """Read every packet and decode the first frame: its true size, its rotation, and that the codec works."""
    with opened(path, max_pixels=max_pixels) as (container, stream):
        context = stream.codec_context
        if context.width * context.height > max_pixels:
            size = f"{context.width} x {context.height}"
            raise ClipError("too_large", f"frames of {size} pixels; allowed: {max_pixels} pixels", path)
        found = _Packets(
            codec=_CODEC_NAMES.get(context.name, context.name),
            container_format=container.format.name,
            header_frames=stream.frames,
            time_base=float(stream.time_base or 0),
            rate=float(stream.average_rate or stream.guessed_rate or 1),
        )
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ClipError("truncated", "the file ends inside a frame", path)
            if found.first is None:
                found.first = next(iter(packet.decode()), None)
            found.count += packet.size > 0 or packet.dts is not None
            if packet.size:
                found.pts.append(packet.pts)
                found.is_key.append(packet.is_keyframe)
                found.yields.append(_is_shown(found.codec, packet))
                found.is_visible.append(found.yields[-1] and not packet.is_discard)
    return found


def _frame_times(path: str, packets: _Packets, max_pixels: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """(each frame's time in the stream's unit, seconds from the first, whether frames can be found by time)."""
    in_container = packets.container_format.split(",")[0] in _COUNTABLE_CONTAINERS
    visible = [time for time, shown in zip(packets.pts, packets.is_visible, strict=True) if shown]
    known = [time for time in visible if time is not None]
    unique = len(set(known)) == len(visible) > 0
    if in_container and packets.codec in _COUNTABLE_CODECS and unique and None not in packets.pts:
        frame_pts = np.sort(np.array(known, np.int64))
        return frame_pts, (frame_pts - frame_pts[0]) * packets.time_base, True
    frame_pts, seconds = _count_by_decoding(path, max_pixels, packets.rate)
    return frame_pts, seconds, False


def _check_whole(path: str, packets: _Packets, max_pixels: int) -> None:
    """Raise for a truncated file, or one with fewer packets than frames in its header."""
    fault = structure_fault(path)
    if fault is not None:
        raise ClipError(fault.cause, fault.message, path)
    count = packets.count
    if packets.header_frames > count and packets.container_format.startswith("mov"):
        # an edit list may leave packets out, and that is no fault
        with opened(path, max_pixels=max_pixels, options={"ignore_editlist": "1"}) as (container, stream):
            count = sum(1 for packet in container.demux(stream) if packet.size)
    if packets.header_frames > count and packets.container_format == "avi":
        count += avi_dropped_frames(path)
    if packets.header_frames > count:
        message = f"the header claims {packets.header_frames} frames, the file has {count}"
        raise ClipError("truncated", message, path)


def _is_shown(codec: str, packet: av.Packet) -> bool:
    """Whether a packet yields a frame; VP8 and VP9 hold alternate references that are never shown."""
    if codec not in ("vp8", "vp9"):
        return True
    data = bytes(packet)
    if codec == "vp8":
        return bool(data[0] >> 4 & 1)  # RFC 6386, 9.1: show_frame
    return any(_vp9_is_shown(frame) for frame in _vp9_frames(data))


def _vp9_frames(data: bytes) -> list[bytes]:
    """The frames of a VP9 superframe (VP9 bitstream specification, annex B)."""
    marker = data[-1]
    if marker >> 5 != 0b110:
        return [data]
    count, size_length = (marker & 7) + 1, (marker >> 3 & 3) + 1
    start = len(data) - (2 + count * size_length)
    if start < 0 or data[start] != marker:
        return [data]
    frames, offset = [], 0
    for number in range(count):
        at = start + 1 + number * size_length
        size = int.from_bytes(data[at : at + size_length], "little")
        frames.append(data[offset : offset + size])
        offset += size
    return frames


def _vp9_is_shown(frame: bytes) -> bool:
    """show_existing_frame or show_frame of an uncompressed header (VP9 specification, 6.2)."""
    if not frame:
        return False
    bits = frame[0]
    profile = (bits >> 5 & 1) | (bits >> 4 & 1) << 1
    at = 2 if profile == 3 else 3  # profile 3 has a reserved bit before
    show_existing, show = bits >> at & 1, bits >> (at - 2) & 1
    return bool(show_existing or show)


def _count_by_decoding(path: str, max_pixels: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Decode a stream whose packets are not frames: (times in its unit, seconds from the first)."""
    times: list[float] = []
    with opened(path, max_pixels=max_pixels) as (container, stream):
        for frame in container.decode(stream):
            known = frame.time if frame.time is not None else -1.0
            times.append(known if not times or known > times[-1] else times[-1] + 1 / rate)
    if not times:
        raise ClipError("no_frames", "no frame of the video stream decodes", path)
    seconds = np.array(times) - times[0]
    return np.arange(len(times), dtype=np.int64), seconds
