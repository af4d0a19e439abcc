"""Small test videos and pictures whose pixels tell the frame's number, and files broken in every way.

A frame is a grid of 3 x 3 blocks: the top left one is red (it tells which way is up, and that the frame is not
black), the other eight are the bits of the frame's number, dark for 0 and light for 1.
"""

from __future__ import annotations

import struct
import wave
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

DARK, LIGHT = 40, 215
RED = (220, 30, 30)
RATE = 25
VFR_MILLISECONDS = (0, 40, 80, 200, 240, 560, 600, 640, 1000, 1040, 1080, 1500)


def code_frame(number: int, width: int, height: int) -> np.ndarray:
    """The picture of a frame number below 256, [height, width, 3] uint8."""
    blocks = np.empty((3, 3, 3), np.uint8)
    blocks[0, 0] = RED
    for bit in range(8):
        blocks[(bit + 1) // 3, (bit + 1) % 3] = LIGHT if number >> bit & 1 else DARK
    rows = np.arange(height) * 3 // height
    columns = np.arange(width) * 3 // width
    return blocks[rows[:, None], columns[None, :]]


def read_code(frame_HWC: np.ndarray) -> int:
    """The number in a frame with values 0-255; raises where the red block is not at the top left."""
    height, width = frame_HWC.shape[:2]

    def block(row: int, column: int) -> np.ndarray:
        y, x = (2 * row + 1) * height // 6, (2 * column + 1) * width // 6
        return frame_HWC[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].reshape(-1, 3).mean(0)

    red = block(0, 0)
    if not (red[0] > 140 and red[1] < 110 and red[2] < 110):
        raise ValueError(f"no red block at the top left: {red.round()}")
    return sum(int(block((bit + 1) // 3, (bit + 1) % 3).mean() > (DARK + LIGHT) / 2) << bit for bit in range(8))


def write_video(
    path: Path,
    codec: str,
    *,
    frames: int = 20,
    width: int = 96,
    height: int = 96,
    gop: int = 8,
    pixel_format: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `frames` coded frames; `milliseconds` gives each frame its own time (variable rate)."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(code_frame(number, width, height), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


X264 = {"bf": "3", "preset": "veryfast", "x264-params": "b-adapt=0:scenecut=0", "crf": "18"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}
MJPEG = {"qmin": "2", "qmax": "4"}


def h264_with_b_frames(folder: Path) -> Path:
    """H.264, three B-frames between references, a key frame every 8: decoding order is not display order."""
    return write_video(folder / "h264_b.mp4", "libx264", options=X264)


def vp9(folder: Path) -> Path:
    """VP9 in webm, a key frame every 8."""
    return write_video(folder / "vp9.webm", "libvpx-vp9", options=VP9)


def vp9_long_gop(folder: Path) -> Path:
    """VP9 with one key frame, with alternate reference frames (packets that hold a hidden frame)."""
    options = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "10", "crf": "25", "b": "0"}
    return write_video(folder / "vp9_long.webm", "libvpx-vp9", frames=40, gop=250, options=options)


def vp8(folder: Path) -> Path:
    """VP8 in webm, one key frame."""
    return write_video(folder / "vp8.webm", "libvpx", gop=250, options={"deadline": "realtime", "b": "300k"})


def vp8_with_hidden_frame(folder: Path, hidden: int = 5) -> Path:
    """VP8 with one frame marked as never shown (as alternate references are): packets are more than frames."""
    source, path = vp8(folder), folder / "vp8_hidden.webm"
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
            data = bytearray(bytes(packet))
            if number == hidden:
                data[0] &= ~0x10  # RFC 6386, 9.1: show_frame
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe = packet.is_keyframe
            changed.stream = copy
            output.mux(changed)
    return path


def edit_list(folder: Path, codec: str = "libx264", cut: int = 5) -> Path:
    """An mp4 whose edit list hides the first frames, as cutting without re-encoding leaves it."""
    source = h264_with_b_frames(folder) if codec == "libx264" else vp9(folder)
    path = folder / f"edit_list_{codec}.mp4"
    with av.open(str(source)) as container:
        with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output:
            stream = container.streams.video[0]
            copy = output.add_stream_from_template(stream)
            step = round(1 / RATE / stream.time_base)
            for packet in container.demux(stream):
                if packet.size:
                    packet.pts -= cut * step
                    packet.dts -= cut * step
                    packet.stream = copy
                    output.mux(packet)
    return path


def mjpeg(folder: Path) -> Path:
    """Motion JPEG in AVI."""
    return write_video(folder / "mjpeg.avi", "mjpeg", pixel_format="yuvj420p", options=MJPEG)


def mpeg4_avi(folder: Path) -> Path:
    """MPEG-4 part 2 with B-frames in AVI, as old film data sets have it."""
    return write_video(folder / "mpeg4.avi", "mpeg4", options={"bf": "2", "b": "500k"})


def variable_rate(folder: Path, codec: str = "libvpx-vp9", suffix: str = ".webm") -> Path:
    """Frames at VFR_MILLISECONDS."""
    options = VP9 if codec == "libvpx-vp9" else X264
    times = VFR_MILLISECONDS
    return write_video(
        folder / f"vfr_{codec}{suffix}", codec, frames=len(times), milliseconds=times, options=options, gop=6
    )


def rotated_phone_clip(folder: Path, degrees: int = 90, codec: str = "libx264") -> Path:
    """An mp4 whose frames are stored lying on their side, with the tag that says how to turn them.

    `degrees` is the clockwise turn that makes them upright. Upright it is 96 wide and 128 high (for 90 and 270).
    """
    upright_width, upright_height = 96, 128
    path = folder / f"rotated_{degrees}_{codec}.mp4"
    turns = degrees // 90
    stored = np.rot90(code_frame(0, upright_width, upright_height), turns)  # np.rot90 turns counter-clockwise
    height, width = stored.shape[:2]
    options = {"libx264": X264, "libvpx-vp9": VP9}[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 8
        stream.set_display_rotation(-degrees)  # FFmpeg's angle is counter-clockwise
        for number in range(12):
            picture = np.ascontiguousarray(np.rot90(code_frame(number, upright_width, upright_height), turns))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def odd_size(folder: Path) -> Path:
    """357 x 241 VP9, 4:4:4 so that no chroma row is shared at the edge."""
    return write_video(
        folder / "odd.webm", "libvpx-vp9", frames=6, width=357, height=241, pixel_format="yuv444p", options=VP9
    )


def odd_size_420(folder: Path) -> Path:
    """357 x 241 Motion JPEG, 4:2:0."""
    return write_video(
        folder / "odd.avi", "mjpeg", frames=6, width=357, height=241, pixel_format="yuvj420p", options=MJPEG
    )


def short(folder: Path, frames: int) -> Path:
    """A VP9 clip of one or three frames."""
    return write_video(folder / f"short_{frames}.webm", "libvpx-vp9", frames=frames, options=VP9)


GOOD: dict[str, Callable[[Path], Path]] = {
    "h264_b": h264_with_b_frames,
    "vp9": vp9,
    "vp9_long": vp9_long_gop,
    "vp8": vp8,
    "vp8_hidden": vp8_with_hidden_frame,
    "edit_list_h264": edit_list,
    "edit_list_vp9": lambda folder: edit_list(folder, "libvpx-vp9"),
    "mjpeg": mjpeg,
    "mpeg4": mpeg4_avi,
    "vfr_vp9": variable_rate,
    "vfr_h264": lambda folder: variable_rate(folder, "libx264", ".mp4"),
    "rotated_h264": rotated_phone_clip,
    "rotated_vp9": lambda folder: rotated_phone_clip(folder, 270, "libvpx-vp9"),
    "upside_down": lambda folder: rotated_phone_clip(folder, 180, "libvpx-vp9"),
    "one_frame": lambda folder: short(folder, 1),
    "three_frames": lambda folder: short(folder, 3),
    "odd": odd_size,
    "odd_420": odd_size_420,
}


def expected_codes(name: str, num_frames: int) -> list[int]:
    """The numbers in the pixels of a GOOD clip's frames."""
    if name.startswith("edit_list"):
        return list(range(5, 5 + num_frames))
    if name == "vp8_hidden":
        return [number for number in range(num_frames + 1) if number != 5]
    return list(range(num_frames))


def truncated(source: Path, target: Path, share: float = 0.5) -> Path:
    """The first part of a file."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def noise_inside(source: Path, target: Path, *, start: float = 0.3, end: float = 0.8) -> Path:
    """A file with a stretch of its bytes overwritten by noise; its length stays."""
    content = bytearray(source.read_bytes())
    first, last = int(len(content) * start), int(len(content) * end)
    content[first:last] = np.random.default_rng(0).integers(0, 256, last - first, np.uint8).tobytes()
    target.write_bytes(content)
    return target


def noise_in_packet(source: Path, target: Path, number: int = 4) -> Path:
    """A file whose structure is whole but whose packet (in decoding order) holds noise."""
    content = source.read_bytes()
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    at = content.index(packets[number])
    noise = np.random.default_rng(1).integers(0, 256, len(packets[number]), np.uint8).tobytes()
    target.write_bytes(content[:at] + noise + content[at + len(noise) :])
    return target


def audio_only(folder: Path) -> Path:
    """A wav file named .mp4."""
    path = folder / "audio.mp4"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\1" * 4000)
    return path


def more_frames_claimed(folder: Path) -> Path:
    """An mp4 with its index in front (faststart) cut short: the header promises frames that are not there."""
    whole = write_video(
        folder / "faststart_whole.mp4", "libx264", options=X264, container_options={"movflags": "faststart"}
    )
    return truncated(whole, folder / "claims_more.mp4", 0.7)


def picture(folder: Path, name: str = "picture.png", width: int = 96, height: int = 64, number: int = 5) -> Path:
    """A coded still picture."""
    path = folder / name
    Image.fromarray(code_frame(number, width, height)).save(path)
    return path


def picture_bomb(folder: Path, side: int = 30_000) -> Path:
    """A PNG of a few hundred bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = folder / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    return path


def broken_files(folder: Path) -> dict[str, tuple[Path, str, set[str]]]:
    """Files that must be refused: name -> (path, kind, causes allowed)."""
    folder.mkdir(parents=True, exist_ok=True)
    webm, mp4, avi = vp9_long_gop(folder), h264_with_b_frames(folder), mjpeg(folder)
    jpg = picture(folder, "real.jpg")
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is no video, whatever its name says.\n" * 50)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n")
    (folder / "jpg.mp4").write_bytes(jpg.read_bytes())
    (folder / "folder.mp4").mkdir(exist_ok=True)
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    return {
        "truncated_webm": (truncated(webm, folder / "cut.webm"), "video", {"truncated"}),
        "truncated_mp4": (truncated(mp4, folder / "cut.mp4"), "video", {"truncated"}),
        "truncated_avi": (truncated(avi, folder / "cut.avi"), "video", {"truncated"}),
        "claims_more": (more_frames_claimed(folder), "video", {"truncated"}),
        "noise_webm": (noise_inside(webm, folder / "noise.webm"), "video", {"decode_failed", "truncated"}),
        "noise_mp4": (noise_inside(mp4, folder / "noise.mp4"), "video", {"decode_failed", "truncated"}),
        "zero_bytes": (folder / "zero.mp4", "video", {"empty"}),
        "text": (folder / "text.mp4", "video", {"not_a_video"}),
        "playlist": (folder / "playlist.mp4", "video", {"not_a_video"}),
        "jpg_as_mp4": (folder / "jpg.mp4", "video", {"not_a_video"}),
        "audio_only": (audio_only(folder), "video", {"no_frames"}),
        "directory": (folder / "folder.mp4", "video", {"directory"}),
        "missing": (folder / "nowhere.mp4", "video", {"missing"}),
        "bomb": (picture_bomb(folder), "image", {"too_large"}),
        "zero_picture": (folder / "zero.jpg", "image", {"empty"}),
        "text_picture": (folder / "text.jpg", "image", {"not_a_video"}),
        "truncated_picture": (truncated(jpg, folder / "cut.jpg"), "image", {"truncated", "decode_failed"}),
        "video_as_picture": (webm, "image", {"not_a_video"}),
    }
