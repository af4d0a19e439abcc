"""What probe says of good files and how it refuses bad ones, without a decoder."""

from __future__ import annotations

import errno
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from frozen_fast.data.decode import ClipError, VideoInfo, probe, pyav
from frozen_fast.data.decode import frame_index as index_module
from frozen_fast.data.decode.containers import structure_fault
from frozen_fast.data.decode.frame_index import _is_shown, _vp9_frames, read_index
from support import videos

probe_module = sys.modules["frozen_fast.data.decode.probe"]  # the package has a function of this name

MAX_PIXELS = 50_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def broken(folder: Path) -> dict[str, tuple[Path, str, set[str]]]:
    return videos.broken_files(folder / "broken")


@pytest.mark.parametrize("name", sorted(videos.GOOD))
def test_the_number_of_frames_is_the_number_that_decodes(folder: Path, name: str) -> None:
    path = videos.GOOD[name](folder)
    info = probe(path, "video", max_pixels=MAX_PIXELS)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert info.num_frames == len(times)
    assert info.presentation_seconds.shape == (len(times),) and info.presentation_seconds[0] == 0
    assert (np.diff(info.presentation_seconds) > 0).all()
    assert np.allclose(info.presentation_seconds, np.array(times) - times[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "codec", "size", "rotation"),
    [
        ("h264_b", "h264", (96, 96), 0),
        ("vp9", "vp9", (96, 96), 0),
        ("vp8", "vp8", (96, 96), 0),
        ("mjpeg", "mjpeg", (96, 96), 0),
        ("mpeg4", "mpeg4", (96, 96), 0),
        ("rotated_h264", "h264", (96, 128), 90),
        ("rotated_vp9", "vp9", (96, 128), 270),
        ("upside_down", "vp9", (96, 128), 180),
        ("odd", "vp9", (357, 241), 0),
        ("odd_420", "mjpeg", (357, 241), 0),
    ],
)
def test_codec_upright_size_and_rotation(
    folder: Path, name: str, codec: str, size: tuple[int, int], rotation: int
) -> None:
    info = probe(videos.GOOD[name](folder), "video", max_pixels=MAX_PIXELS)
    assert (info.codec, (info.width, info.height), info.rotation_degrees) == (codec, size, rotation)
    assert info.frames_per_second == pytest.approx(videos.RATE, rel=1e-6)


def test_only_odd_codecs_are_decoded_to_be_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    real = index_module._count_by_decoding
    spy = lambda path, *rest: counted.append(path) or real(path, *rest)  # noqa: E731
    monkeypatch.setattr(index_module, "_count_by_decoding", spy)
    for name in sorted(videos.GOOD):
        read_index(str(videos.GOOD[name](folder)), max_pixels=MAX_PIXELS)
    assert [Path(path).name for path in counted] == ["mpeg4.avi"]


@pytest.mark.parametrize("name", ["vfr_vp9", "vfr_h264"])
def test_times_of_a_variable_rate_clip_are_its_own(folder: Path, name: str) -> None:
    info = probe(videos.GOOD[name](folder), "video", max_pixels=MAX_PIXELS)
    assert np.allclose(info.presentation_seconds * 1000, videos.VFR_MILLISECONDS, atol=1)
    assert info.frames_per_second == pytest.approx(11 / 1.5)
    # times: 0 40 80 200 240 560 600 640 1000 1040 1080 1500
    assert info.frame_range(None, None) == (0, 12)
    assert info.frame_range(0.1, 0.24) == (2, 4)  # frame 2 is on screen at 0.1, frame 4 appears at 0.24
    assert info.frame_range(0.2, 0.6) == (3, 6)
    assert info.frame_range(0.3, 0.35) == (4, 5)  # frame 4 stays on screen from 0.24 to 0.56
    assert info.frame_range(0.64, None) == (7, 12)
    assert info.frame_range(99.0, 100.0) == (11, 12)
    assert info.frame_range(-5.0, 0.04) == (0, 1)
    assert info.frame_range(0.5, 0.1) == (4, 5)  # an empty range still has a frame


def test_frame_range_forgives_rounded_decimals() -> None:
    info = VideoInfo(30, 30.0, 8, 8, "h264", 0, np.arange(30) / 30)
    assert info.frame_range(0.333333, 0.666667) == (10, 20)


def test_frames_that_are_never_shown_are_not_counted() -> None:
    class Packet(bytes):
        pass

    assert _is_shown("vp8", Packet([0b0001_0000, 0, 0])) and not _is_shown("vp8", Packet([0b1110_0001, 0, 0]))
    shown, hidden, repeated = bytes([0b1000_0110, 1]), bytes([0b1000_0100, 2]), bytes([0b1000_1000])
    profile_3 = bytes([0b1011_0011]), bytes([0b1011_0010]), bytes([0b1011_0100])
    assert [_is_shown("vp9", Packet(data)) for data in (shown, hidden, repeated)] == [True, False, True]
    assert [_is_shown("vp9", Packet(data)) for data in profile_3] == [True, False, True]
    marker = bytes([0b1100_0001])  # two frames, sizes of one byte
    superframe = hidden + shown + marker + bytes([len(hidden), len(shown)]) + marker
    assert _vp9_frames(superframe) == [hidden, shown] and _is_shown("vp9", Packet(superframe))
    assert not _is_shown("vp9", Packet(hidden + hidden + marker + bytes([2, 2]) + marker))


def test_an_edit_list_hides_frames_and_is_no_fault(folder: Path) -> None:
    assert probe(videos.edit_list(folder), "video", max_pixels=MAX_PIXELS).num_frames == 15


BROKEN = (
    "truncated_webm truncated_mp4 truncated_avi claims_more noise_webm noise_mp4 zero_bytes text playlist jpg_as_mp4 "
    "audio_only directory missing bomb zero_picture text_picture truncated_picture video_as_picture"
).split()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_their_cause(broken: dict, name: str) -> None:
    path, kind, causes = broken[name]
    with pytest.raises(ClipError) as caught:
        probe(path, kind, max_pixels=MAX_PIXELS)
    assert caught.value.cause in causes
    assert caught.value.path == str(path) and caught.value.message and "\n" not in caught.value.message
    assert str(path) in str(caught.value)


def test_every_broken_file_is_tested(broken: dict) -> None:
    assert sorted(BROKEN) == sorted(broken)


def test_a_video_with_large_frames_is_refused_before_it_is_decoded(folder: Path) -> None:
    with pytest.raises(ClipError) as caught:
        probe(videos.vp9(folder), "video", max_pixels=96 * 96 - 1)
    assert caught.value.cause == "too_large" and "96 x 96" in caught.value.message


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["vp9", "h264_b", "mjpeg", "mpeg4", "rotated_vp9"])
def test_a_file_cut_anywhere_is_never_a_shorter_clip(folder: Path, name: str, share: float) -> None:
    whole = videos.GOOD[name](folder)
    cut = videos.truncated(whole, folder / f"cut_{share}_{whole.name}", share)
    with pytest.raises(ClipError) as caught:
        probe(cut, "video", max_pixels=MAX_PIXELS)
    assert caught.value.cause == "truncated"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ClipError) as caught:
        probe(tmp_path / "pipe.mp4", "video", max_pixels=MAX_PIXELS)
    assert caught.value.cause == "not_a_video"


def test_answers_are_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["frozen_fast.data.decode.probe"]  # the package's attribute of that name is the function
    reads = []
    real = module.read_index
    monkeypatch.setattr(module, "read_index", lambda path, **more: reads.append(path) or real(path, **more))
    path = videos.short(tmp_path, 3)
    for _ in range(3):
        assert probe(path, "video", max_pixels=MAX_PIXELS).num_frames == 3
    assert len(reads) == 1
    path.write_bytes(videos.short(tmp_path, 1).read_bytes())
    assert probe(path, "video", max_pixels=MAX_PIXELS).num_frames == 1
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ClipError, match="empty"):
            probe(path, "video", max_pixels=MAX_PIXELS)


def _element(identity: bytes, data: bytes, *, unknown: bool = False) -> bytes:
    return identity + (b"\x01" + b"\xff" * 7 if unknown else struct.pack(">Q", len(data) | 1 << 56)) + data


@pytest.mark.parametrize("unknown", [False, True], ids=["sized", "live"])
def test_matroska_structure(tmp_path: Path, unknown: bool) -> None:
    head = _element(b"\x1a\x45\xdf\xa3", b"\x42\x86\x81\x01")
    block = _element(b"\xa3", b"\x81\x00\x00\x80" + b"x" * 50)
    cluster = _element(b"\x1f\x43\xb6\x75", b"\xe7\x81\x00" + block * 3, unknown=unknown)
    body = _element(b"\x16\x54\xae\x6b", b"tracks") + cluster + cluster + _element(b"\x1c\x53\xbb\x6b", b"cues")
    path = tmp_path / "a.webm"

    def fault_of(content: bytes) -> str | None:
        path.write_bytes(content)
        fault = structure_fault(str(path))
        return fault.cause if fault else None

    whole = head + _element(b"\x18\x53\x80\x67", body, unknown=unknown)
    assert fault_of(whole) is None
    assert fault_of(whole[:-30]) == "truncated"
    at = whole.index(b"\xa3", len(head) + 30)
    assert fault_of(whole[:at] + b"\x99" + whole[at + 1 :]) == "decode_failed"
    assert fault_of(head) == "truncated"


def without_frames(path: Path, dropped: tuple[int, ...], *, keeps_chunks: bool) -> Path:
    """An AVI in which some frames hold nothing, as recorders write it: a chunk of size 0, or only an index entry."""
    whole = path.read_bytes()
    movi, index = whole.find(b"movi"), whole.rfind(b"idx1")
    entries = whole[index + 8 :]
    body, table = b"", b""
    for number in range(len(entries) // 16):
        name, flags, offset, size = struct.unpack("<4sIII", entries[16 * number : 16 * number + 16])
        start = movi + offset + 8
        data = b"" if number in dropped else whole[start : start + size]
        table += struct.pack("<4sIII", name, flags, 4 + len(body), len(data))
        if data or keeps_chunks:
            body += name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1)
    lists = struct.pack("<I", 4 + len(body)) + b"movi" + body + b"idx1" + struct.pack("<I", len(table)) + table
    changed = whole[: movi - 4] + lists
    path = path.with_name(f"dropped_{keeps_chunks}.avi")
    path.write_bytes(changed[:4] + struct.pack("<I", len(changed) - 8) + changed[8:])
    return path


@pytest.mark.parametrize("keeps_chunks", [True, False])
def test_an_avi_with_dropped_frames_is_whole_and_one_without_their_entries_is_not(
    tmp_path: Path, keeps_chunks: bool
) -> None:
    source = videos.write_video(tmp_path / "all.avi", "mjpeg", pixel_format="yuvj420p", options=videos.MJPEG)
    path = without_frames(source, (4, 9), keeps_chunks=keeps_chunks)
    index = read_index(str(path), max_pixels=MAX_PIXELS)
    assert index.info.num_frames == 18
    frames = pyav.read_frames(str(path), index, list(range(18)), MAX_PIXELS)
    assert [videos.read_code(frame) for frame in frames] == [number for number in range(20) if number not in (4, 9)]
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"idx1")])  # the frames are gone and no index says so
    with pytest.raises(ClipError, match="truncated|claims"):
        read_index(str(path), max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("codec", ["mjpeg", "libx264"])
def test_an_mp4_whose_times_run_out_of_order_is_read_in_the_order_of_its_times(tmp_path: Path, codec: str) -> None:
    order = [0, 1, 3, 2, 4, 5, 8, 6, 7, 9]
    path = tmp_path / "unordered.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = 0, 4
        packets = []
        for number in range(len(order)):
            frame = av.VideoFrame.from_ndarray(videos.code_frame(number, 96, 96), format="rgb24")
            packets += stream.encode(frame)
        for number, packet in enumerate([*packets, *stream.encode(None)]):
            packet.dts, packet.pts, packet.time_base = number - 10, order[number], Fraction(1, 10)
            packet.stream = stream
            container.mux(packet)
    index = read_index(str(path), max_pixels=MAX_PIXELS)
    frames = pyav.read_frames(str(path), index, list(range(len(order))), MAX_PIXELS)
    assert [videos.read_code(frame) for frame in frames] == [order.index(time) for time in range(len(order))]
    single = [pyav.read_frames(str(path), index, [place], MAX_PIXELS)[0] for place in (2, 6, 8)]
    assert [videos.read_code(frame) for frame in single] == [3, 7, 6]


def test_a_disk_that_fails_once_makes_no_bad_clip_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = videos.write_video(tmp_path / "good.avi", "mjpeg", pixel_format="yuvj420p", options=videos.MJPEG)
    real = probe_module.read_index

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(probe_module, "read_index", fail)
    with pytest.raises(ClipError, match="Input/output error"):
        probe(path, "video", max_pixels=MAX_PIXELS)
    monkeypatch.setattr(probe_module, "read_index", real)
    assert probe(path, "video", max_pixels=MAX_PIXELS).num_frames == 20
