"""Packed folders broken in every way: named errors, bad clips in their place, never a wrong or black frame."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TestView
from frozen_fast.data.load.reading import probe
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.shards import jpeg
from frozen_fast.data.shards import shard_index as shard_index
from frozen_fast.data.sources import Source
from frozen_fast.errors import UserError
from support import packing
from support.packing import pack, source_of

SETTINGS = PackSettings(frames_per_clip=2, shard_bytes=12_000)
VIEW = TestView(packing.RESOLUTION)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    pack(source_of(packing.manifest(folder, 5)), folder / "packed", SETTINGS)
    assert len(list((folder / "packed").glob("*.tar"))) >= 2
    return folder / "packed"


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "packed"))


def outcomes_of(source: Source) -> list[Decoded | ClipError]:
    return packing.decoder().decode([DecodeRequest(clip.path, "video", (0, 1), VIEW) for clip in source.clips])


def causes(source: Source) -> list[str]:
    """Each clip's cause, "" where it is read; what is read is right."""
    outcomes = outcomes_of(source)
    for outcome in outcomes:
        if isinstance(outcome, Decoded):
            assert packing.codes(outcome.frames_TCHW) == [4, 14]
    return [outcome.cause if isinstance(outcome, ClipError) else "" for outcome in outcomes]


def in_shard(source: Source, number: int) -> list[bool]:
    return [f"shard-{number:05d}.tar#" in clip.path for clip in source.clips]


def frames_of(folder: Path) -> np.ndarray:
    return np.load(folder / "frames.npy")


HARM_AT_START: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "index.json").unlink(), "packing is not finished"),
    "nothing at all": (lambda f: [path.unlink() for path in f.iterdir()], "no index.json"),
    "index is no JSON": (lambda f: (f / "index.json").write_text("{"), "cannot be read as JSON"),
    "index is something else": (lambda f: (f / "index.json").write_text("[]"), "not an index"),
    "another version": (lambda f: edit(f, version=99), "version: got 99; allowed: 1"),
    "index lacks a key": (lambda f: edit(f, splits=None), "not an index of packed frames"),
    "index of wrong kind": (lambda f: edit(f, kind="sound"), "not an index of packed frames"),
    "shard missing": (lambda f: (f / "shard-00001.tar").unlink(), "shard-00001.tar: missing"),
    "shard truncated": (lambda f: os.truncate(f / "shard-00000.tar", 1000), "shard-00000.tar: got 1000 bytes"),
    "shard longer": (lambda f: (f / "shard-00000.tar").open("ab").write(b"x"), "shard-00000.tar: got"),
    "table missing": (lambda f: (f / "clips.npy").unlink(), "clips.npy: missing"),
    "table truncated": (lambda f: os.truncate(f / "frames.npy", 200), "frames.npy: got 200 bytes"),
    "table is no table": (lambda f: overwrite(f / "clips.npy", b"x"), "clips.npy: not a table"),
    "table of objects": (lambda f: pickled_table(f), "clips.npy: not a table"),
    "clip list truncated": (lambda f: os.truncate(f / "clips.jsonl", 50), "clips.jsonl: got 50 bytes"),
    "clip list line is no JSON": (lambda f: change_line(f, "{"), "clips.jsonl:1: not a packed clip"),
    "clip list line lacks a key": (lambda f: change_line(f, '{"id": "c0"}'), "clips.jsonl:1: not a packed clip"),
    "clip list has no captions": (lambda f: reline(f, captions=[]), "clips.jsonl:1: not a packed clip"),
    "clip list has another kind": (lambda f: reline(f, kind="image"), "clips.jsonl:1: kind: got 'image'"),
    "clip list is too short": (lambda f: change_line(f, None), "clips.jsonl:1: path: got"),
    "clip list names a file": (lambda f: reline(f, path="../../../etc/passwd"), "clips.jsonl:1: path: got"),
    "clip list in another order": (lambda f: reline(f, path="shard-00000.tar#1"), "clips.jsonl:1: path: got"),
}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def overwrite(path: Path, byte: bytes) -> None:
    path.write_bytes(byte * path.stat().st_size)


def pickled_table(folder: Path) -> None:
    np.save(folder / "clips.npy", np.array([{"a": 1}] * 3, object), allow_pickle=True)
    edit(folder, files=sizes(folder))


def sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in ("clips.jsonl", "clips.npy", "frames.npy")}


def change_line(folder: Path, line: str | None) -> None:
    """Put something else in place of the first line, or nothing."""
    lines = (folder / "clips.jsonl").read_text().splitlines()
    lines[:1] = [] if line is None else [line]
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    edit(folder, files=sizes(folder))


def reline(folder: Path, **changes: object) -> None:
    first = (folder / "clips.jsonl").read_text().splitlines()[0]
    change_line(folder, json.dumps(json.loads(first) | changes))


@pytest.mark.parametrize("harm", HARM_AT_START)
def test_damage_that_is_there_from_the_start_is_named(harm: str, folder: Path) -> None:
    do, message = HARM_AT_START[harm]
    do(folder)
    with pytest.raises(UserError, match=message) as caught:
        source_of(folder)
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_named(folder: Path) -> None:
    assert len(source_of(folder, split="train")) == 5, "the packed manifest names no splits"
    edit(folder, splits={"train": 5})
    with pytest.raises(UserError, match="split: got 'tran'.*did you mean 'train'"):
        source_of(folder, split="tran")


def test_a_shard_that_goes_away_costs_its_clips(folder: Path) -> None:
    source = source_of(folder)
    (folder / "shard-00001.tar").unlink()
    assert causes(source) == ["missing" if gone else "" for gone in in_shard(source, 1)]


def test_a_shard_cut_later_costs_its_clips(folder: Path) -> None:
    source = source_of(folder)
    os.truncate(folder / "shard-00001.tar", 2000)
    assert causes(source) == ["truncated" if cut else "" for cut in in_shard(source, 1)]


def test_a_shard_cut_while_it_is_open_costs_the_frames_behind_the_cut(folder: Path) -> None:
    source = source_of(folder)
    decoder = packing.decoder()
    requests = [DecodeRequest(clip.path, "video", (0, 1), VIEW) for clip in source.clips]
    assert all(isinstance(outcome, Decoded) for outcome in decoder.decode(requests))
    os.truncate(folder / "shard-00000.tar", int(frames_of(folder)[1]["offset"]) + 10)
    outcomes = decoder.decode(requests)
    assert [getattr(outcome, "cause", "") for outcome in outcomes] == [
        "truncated" if cut else "" for cut in in_shard(source, 0)
    ]


@pytest.mark.parametrize("place", [0, 2, 100, -1])
def test_one_changed_byte_costs_one_clip(place: int, folder: Path) -> None:
    source = source_of(folder)
    frame = frames_of(folder)[2]  # the first frame of clip 1
    path = folder / source.clips[1].path.rpartition("/")[2].partition("#")[0]
    data = bytearray(path.read_bytes())
    data[int(frame["offset"]) + place % int(frame["length"])] ^= 0x10
    path.write_bytes(data)
    assert causes(source) == ["", "decode_failed", "", "", ""]


def test_shards_that_changed_places_are_noticed(folder: Path) -> None:
    a, b = folder / "shard-00000.tar", folder / "shard-00001.tar"
    size = min(a.stat().st_size, b.stat().st_size)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second[:size].ljust(len(first), b"\0"))
    b.write_bytes(first[:size].ljust(len(second), b"\0"))
    source = source_of(folder)
    moved = [one or two for one, two in zip(in_shard(source, 0), in_shard(source, 1), strict=True)]
    assert causes(source) == ["decode_failed" if hit else "" for hit in moved]


@pytest.mark.parametrize(
    ("column", "value", "cause"),
    [
        ("offset", 2**40, "truncated"),
        ("length", 2**31, "truncated"),
        ("crc32", 1, "decode_failed"),
        ("offset", 0, "decode_failed"),
        ("length", 3, "decode_failed"),
    ],
)
def test_a_damaged_frame_table_costs_its_clips(column: str, value: int, cause: str, folder: Path) -> None:
    table = np.load(folder / "frames.npy")
    table[column][0] = value
    np.save(folder / "frames.npy", table)
    assert causes(source_of(folder)) == [cause, "", "", "", ""]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("first_frame", 10**9),
        ("first_frame", 2**63),
        ("frames", 0),
        ("frames", 10**6),
        ("height", 0),
        ("width", 95),
        ("height", 2**31),
    ],
)
def test_a_damaged_clip_table_costs_its_clips(column: str, value: int, folder: Path) -> None:
    table = np.load(folder / "clips.npy")
    table[column][1] = value
    np.save(folder / "clips.npy", table)
    source = source_of(folder)
    assert causes(source) == ["", "decode_failed", "", "", ""]


def test_addresses_that_do_not_fit_the_index_are_bad_clips(folder: Path) -> None:
    source_of(folder)
    for address in ("shard-00000.tar#99", "shard-00001.tar#0", "shard-00077.tar#0"):
        with pytest.raises(ClipError, match="decode_failed"):
            probe(f"{folder}/{address}", "video", max_pixels=10**6)
        (outcome,) = packing.decoder().decode([DecodeRequest(f"{folder}/{address}", "video", (0,), VIEW)])
        assert isinstance(outcome, ClipError)
    with pytest.raises(ClipError, match=r"index\.json"):
        probe(f"{folder}/elsewhere/shard-00000.tar#0", "video", max_pixels=10**6)


def test_a_process_that_opens_the_index_later_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(folder)
    monkeypatch.setattr(shard_index, "_open", {})
    (folder / "frames.npy").unlink()
    assert causes(source) == ["decode_failed"] * 5
    monkeypatch.setattr(shard_index, "_open", {})
    (folder / "index.json").unlink()
    assert causes(source) == ["missing"] * 5


def test_a_picture_bomb_is_refused_before_it_is_decoded(folder: Path) -> None:
    """A frame whose header claims 65,000 x 65,000 pixels, with a CRC that fits."""
    table = np.load(folder / "frames.npy")
    offset, length = int(table[0]["offset"]), int(table[0]["length"])
    path = folder / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    frame = data[offset : offset + length]
    start = frame.index(b"\xff\xc0")
    frame[start + 5 : start + 9] = (65_000).to_bytes(2, "big") * 2
    data[offset : offset + length] = frame
    path.write_bytes(data)
    table["crc32"][0] = zlib.crc32(frame)
    np.save(folder / "frames.npy", table)
    source = source_of(folder)
    assert causes(source) == ["decode_failed", "", "", "", ""]
    assert "65000 x 65000" in str(outcomes_of(source)[0]) or "65000, 65000" in str(outcomes_of(source)[0])


NO_JPEGS = (
    b"",
    b"\xff\xd8",
    b"\xff\xd8\xff\xd9",
    b"no picture at all, but long enough",
    b"\xff" * 64,
    b"\xff\xd8" + b"\xff\xe0\x00\x00" * 9,
)


@pytest.mark.parametrize("data", NO_JPEGS)
def test_what_is_no_jpeg_has_no_size(data: bytes) -> None:
    assert jpeg.size_of(memoryview(data)) is None
    with pytest.raises(ValueError, match="no whole JPEG"):
        jpeg.decode(memoryview(bytearray(data)), 8, 8)


def test_jpegs_keep_their_pixels() -> None:
    rows, columns = np.mgrid[:80, :112]
    frame = np.stack([rows * 3, columns * 2, rows + columns], -1).astype(np.uint8)
    data = jpeg.encode(frame, 95)
    assert jpeg.size_of(memoryview(data)) == (80, 112)
    got = jpeg.decode(memoryview(bytearray(data)), 80, 112)
    assert got.shape == frame.shape and np.abs(got.astype(int) - frame).mean() < 1.5
    with pytest.raises(ValueError, match="no whole JPEG of 112 x 81"):
        jpeg.decode(memoryview(bytearray(data)), 81, 112)
    with pytest.raises(ValueError, match="no whole JPEG"):
        jpeg.decode(memoryview(bytearray(data[:-2])), 80, 112)


@pytest.mark.parametrize("name", ["clips.npy", "frames.npy"])
@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_table_is_a_named_error_or_bad_clips(folder: Path, name: str, seed: int) -> None:
    """Random bytes in a table's header and rows; its length stays, so that only its content can tell."""
    rng = random.Random(seed)
    data = bytearray((folder / name).read_bytes())
    for _ in range(rng.choice((1, 4, 40))):
        data[rng.randrange(128 if rng.random() < 0.5 else len(data))] = rng.randrange(256)
    (folder / name).write_bytes(data)
    shard_index._open.clear()
    try:
        source = source_of(folder)
        for clip in source.clips:
            with contextlib.suppress(ClipError):
                probe(clip.path, "video", max_pixels=10**8)
        outcomes = outcomes_of(source)
        assert all(isinstance(outcome, (Decoded, ClipError)) for outcome in outcomes)
    except UserError as error:
        assert "\n" not in str(error)
