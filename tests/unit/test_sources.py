from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources import CaptionRule, Clip, PackedClips, Source, read_source, read_sources
from frozen_fast.data.sources.pickles import load_plain_pickle
from frozen_fast.errors import UserError
from support import datasets


def read(format: Any, path: Path, **fields: Any) -> Source:
    return read_source(SourceConfig(format=format, path=str(path), **fields), "data.sources[0]")


def test_packed_clips_come_back_as_they_were() -> None:
    clips = [
        Clip("a", "x/é.mp4", ("one", "two")),
        Clip("b", "y.jpg", ("drei",), "image", 1.5, 2.25, "val", "a"),
        Clip("l", "y.avi", ("run",), label="run", segments=((0.0, 5.0), (10.0, 15.0))),
        Clip("c\udc80", "z", ("",)),
    ]
    packed = PackedClips(clips)
    assert list(packed) == clips and len(packed) == 4
    assert packed[-1] == clips[-1] and packed[0:3:2] == clips[0:3:2]
    assert list(pickle.loads(pickle.dumps(packed))) == clips
    assert list(packed) == clips, "still readable here after it was sent to a process"
    assert list(pickle.loads(pickle.dumps(PackedClips([])))) == []
    with pytest.raises(IndexError):
        packed[4]
    assert len(PackedClips([])) == 0


@pytest.mark.parametrize(("cut", "split"), [("2M", "train"), ("2M", "val"), ("10M", "train")])
def test_webvid(tmp_path: Path, cut: str, split: str) -> None:
    ids = datasets.write_webvid(tmp_path, 5, cut=cut, split=split)
    source = read("webvid", tmp_path, split_version=cut, split=split)
    assert [clip.id for clip in source.clips] == ids
    assert all(Path(clip.path).is_file() and clip.split == split for clip in source.clips)
    assert source.clips[1].captions == ("stock clip, number 1",)
    assert source.name == "webvid" and source.kind == "video" and source.drops == {}


def test_webvid_counts_each_row_that_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets.write_webvid(tmp_path, 4)
    with (tmp_path / "metadata/results_2M_train.csv").open("a", encoding="utf-8") as file:
        file.write("1000,u,d,000000_000000,again\n")  # duplicate id
        file.write("7,u,d,,no page\n8,u\n")  # no page_dir, and a short row
        file.write("9,u,d,000001_000001,not there\n10,u,d,nowhere,nor here\n")
        file.write(",u,d,000001_000001,no id\n")
        file.write("1001,u,d,000001_000001,\n")  # a duplicate comes first
    (tmp_path / "videos/000000_000000/1002.mp4").unlink()
    with caplog.at_level(logging.WARNING, "frozen_fast"):
        source = read("webvid", tmp_path, split_version="2M", name="web")
    assert [clip.id for clip in source.clips] == ["1000", "1001", "1003"]
    assert source.drops == {"no page_dir": 2, "file not on disk": 3, "duplicate id": 2, "no videoid": 1}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert any("source web: dropped 3 rows: file not on disk" in message for message in messages)


def test_a_row_without_caption_is_counted(tmp_path: Path) -> None:
    datasets.write_webvid(tmp_path, 2)
    path = tmp_path / "metadata/results_2M_train.csv"
    path.write_text(path.read_text().replace('"stock clip, number 1"', ""))
    assert read("webvid", tmp_path, split_version="2M").drops == {"no caption": 1}


def test_cc3m(tmp_path: Path) -> None:
    ids = datasets.write_cc3m(tmp_path, 4)
    datasets.write_cc3m(tmp_path, 2, split="val")
    source = read("cc3m", tmp_path)
    assert [clip.id for clip in source.clips] == ids and source.kind == "image"
    assert source.clips[2].captions == ("a picture, number 2",)
    assert all(Path(clip.path).is_file() and "training" in clip.path for clip in source.clips)
    assert all("validation" in clip.path for clip in read("cc3m", tmp_path, split="val").clips)


@pytest.mark.parametrize(
    ("cut", "split", "expected"),
    [
        ("1k-A", "train", range(4)),
        ("1k-A", "test", range(4, 8)),
        ("1k-B", "train", range(4)),
        ("1k-B", "test", range(4, 8)),
        ("full", "train", range(4)),
        ("full", "val", range(4, 6)),
        ("full", "test", range(6, 8)),
    ],
)
def test_msrvtt(tmp_path: Path, cut: str, split: str, expected: range) -> None:
    datasets.write_msrvtt(tmp_path, 8)
    source = read("msrvtt", tmp_path, split_version=cut, split=split)
    assert [clip.id for clip in source.clips] == [f"video{number}" for number in expected]
    for clip in source.clips:
        number = int(clip.id[5:])
        if (cut, split) == ("1k-A", "test"):
            assert clip.captions == (f"{clip.id} caption {number % 3}",)
        else:
            assert clip.captions == tuple(f"{clip.id} caption {index}" for index in range(3))


@pytest.mark.parametrize(
    ("cut", "split", "expected"),
    [
        ("1k-A", "train", range(4)),
        ("1k-A-7k", "train", range(3)),
        ("1k-A", "test", range(4, 8)),
        ("full", "train", range(4)),
        ("full", "val", range(4, 5)),
        ("full", "test", range(5, 8)),
    ],
)
def test_msrvtt_clip4clip(tmp_path: Path, cut: str, split: str, expected: range) -> None:
    datasets.write_msrvtt_clip4clip(tmp_path, 8)
    source = read("msrvtt_clip4clip", tmp_path, split_version=cut, split=split)
    assert [clip.id for clip in source.clips] == [f"video{number}" for number in expected]
    one = cut != "full" and split == "test"
    for clip in source.clips:
        two = tuple(f"{clip.id} caption {n}" for n in range(2))
        assert clip.captions == ((f"the sentence of {clip.id}",) if one else two)


def test_caption_indices_of_numpy_integers_are_read(tmp_path: Path) -> None:
    datasets.write_msrvtt(tmp_path, 4)
    path = tmp_path / "high-quality/structured-symlinks/jsfusion_val_caption_idx.pkl"
    for protocol in range(6):
        for kind in (np.int64, np.int32, np.uint8, np.dtype(">i4").type):
            path.write_bytes(pickle.dumps({"video2": kind(2), "video3": kind(1)}, protocol=protocol))
            source = read("msrvtt", tmp_path, split_version="1k-A", split="test")
            assert [clip.captions[0] for clip in source.clips] == ["video2 caption 2", "video3 caption 1"]
    assert load_plain_pickle(_pickled(tmp_path, [np.int16(-3), {"a": [1, 2.5, True, None, b"x"]}])) == [
        -3,
        {"a": [1, 2.5, True, None, b"x"]},
    ]


def _pickled(folder: Path, value: Any) -> Path:
    path = folder / "value.pkl"
    path.write_bytes(pickle.dumps(value))
    return path


class _Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/frozen_fast_must_not_exist"),)


@pytest.mark.parametrize("value", [_Harmful(), np.float64(1.5), np.arange(3), Path("x"), {1: print}])
def test_a_pickle_that_names_anything_else_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match="value.pkl: not a pickle of plain values"):
        load_plain_pickle(_pickled(tmp_path, value))
    assert not Path("/tmp/frozen_fast_must_not_exist").exists()


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x04}", b"cos\nsystem\n(S'true'\ntR."])
def test_a_broken_pickle_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match="broken.pkl"):
        load_plain_pickle(path)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"video2": 9, "video3": 0}, "of video2: got 9; allowed: 0 to 2"),
        ({"video3": 0}, "of video2: got None"),
        ([1], "got list; allowed: a dict"),
        ({"video2": "1"}, "allowed: a dict of video to caption index"),
    ],
)
def test_wrong_caption_indices_are_named(tmp_path: Path, indices: Any, message: str) -> None:
    datasets.write_msrvtt(tmp_path, 4)
    path = tmp_path / "high-quality/structured-symlinks/jsfusion_val_caption_idx.pkl"
    path.write_bytes(pickle.dumps(indices))
    with pytest.raises(UserError, match=message):
        read("msrvtt", tmp_path, split_version="1k-A", split="test")


WRITERS = {
    "webvid": datasets.write_webvid,
    "cc3m": datasets.write_cc3m,
    "msrvtt": datasets.write_msrvtt,
    "msrvtt_clip4clip": datasets.write_msrvtt_clip4clip,
}
CUTS = {"webvid": "2M", "cc3m": "", "msrvtt": "1k-A", "msrvtt_clip4clip": "1k-A"}


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_each_missing_piece_is_named(tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match=r"data.sources\[0\].path: got '.*nowhere', which is not a folder"):
        read(format, tmp_path / "nowhere", split_version=CUTS[format])
    with pytest.raises(UserError, match="got nothing; allowed"):
        read_source(SourceConfig(format=format), "data.sources[0]")  # type: ignore[arg-type]
    WRITERS[format](tmp_path, 4)
    with pytest.raises(UserError, match=r"data.sources\[0\].split: got 'trian' \(did you mean 'train'\?\)"):
        read(format, tmp_path, split_version=CUTS[format], split="trian")
    if CUTS[format]:
        with pytest.raises(UserError, match=r"data.sources\[0\].split_version: got '3M'"):
            read(format, tmp_path, split_version="3M")
    metadata = [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".json", ".txt")]
    named = 0
    for path in metadata:
        content = path.read_bytes()
        path.unlink()
        try:
            read(format, tmp_path, split_version=CUTS[format])
        except UserError as error:
            assert path.name in str(error)
            named += 1
        path.write_bytes(content)
    assert named >= (2 if "msrvtt" in format else 1)


@pytest.mark.parametrize("format", ["webvid", "cc3m", "msrvtt_clip4clip"])
def test_a_missing_column_is_named(tmp_path: Path, format: str) -> None:
    WRITERS[format](tmp_path, 4)
    column = {"webvid": "page_dir", "cc3m": "caption", "msrvtt_clip4clip": "sentence"}[format]
    split = "test" if format == "msrvtt_clip4clip" else "train"
    for path in tmp_path.rglob("*.csv"):
        path.write_text(path.read_text().replace(column, "other"))
    with pytest.raises(UserError, match=rf"\.csv: missing column {column}; got: "):
        read(format, tmp_path, split_version=CUTS[format], split=split)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "missing column videoid"),
        (b"\xff\xfe\x00\x01\n", "not UTF-8"),
        (b"videoid,name,page_dir\n", "no rows"),
        (b"videoid,name,page_dir\n1,x\0y,z\n", "results_2M_train.csv|remains"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    datasets.write_webvid(tmp_path, 2)
    (tmp_path / "metadata/results_2M_train.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("webvid", tmp_path, split_version="2M")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "MSR_VTT.json:1: not JSON"),
        ("[]", "annotations: missing"),
        ('{"annotations": 3}', "annotations: missing"),
        ('{"annotations": [{"image_id": 3, "caption": "x"}]}', r"annotations\[0\].image_id: got 3"),
        ('{"annotations": [{"image_id": "v"}]}', r"annotations\[0\].caption: got None"),
        ("[" * 100_000, "not JSON|nested"),
    ],
)
def test_broken_annotations_are_named(tmp_path: Path, content: str, message: str) -> None:
    datasets.write_msrvtt(tmp_path, 4)
    (tmp_path / "annotation/MSR_VTT.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read("msrvtt", tmp_path, split_version="1k-A")


def test_a_source_whose_clips_are_all_left_out_is_an_error(tmp_path: Path) -> None:
    ids = datasets.write_webvid(tmp_path, 3)
    for path in tmp_path.rglob("*.mp4"):
        path.unlink()
    assert len(ids) == 3
    with pytest.raises(UserError, match=r"data.sources\[0\]: no clip remains of .*file not on disk: 3"):
        read("webvid", tmp_path, split_version="2M")


def test_existence_costs_one_listing_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    datasets.write_webvid(tmp_path, 60)
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(str(folder)) or scandir(folder))
    assert len(read("webvid", tmp_path, split_version="2M")) == 60
    assert len(listed) == len(set(listed)) == 2


def test_max_clips_takes_the_first_readable_ones(tmp_path: Path) -> None:
    ids = datasets.write_webvid(tmp_path, 6)
    (tmp_path / f"videos/000000_000000/{ids[0]}.mp4").unlink()
    source = read("webvid", tmp_path, split_version="2M", max_clips=3)
    assert [clip.id for clip in source.clips] == ids[1:4]


def test_read_sources_wants_different_names(tmp_path: Path) -> None:
    datasets.write_webvid(tmp_path, 3)
    one = SourceConfig(format="webvid", path=str(tmp_path), split_version="2M")
    with pytest.raises(UserError, match=r"data.sources\[1\].name: got 'webvid' twice"):
        read_sources([one, one])
    two = SourceConfig(name="again", format="webvid", path=str(tmp_path), split_version="2M")
    assert list(read_sources([one, two])) == ["webvid", "again"]


def test_an_unknown_layout_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="allowed: activitynet, cc3m, .*webvid"):
        read("webvids", Path("x"))


def test_caption_rules() -> None:
    captions = ("first one", "second", "third")
    rng = np.random.default_rng(0)
    random = {CaptionRule("random").training(captions, rng) for _ in range(50)}
    assert random == set(captions)
    assert {CaptionRule("first").training(captions, rng) for _ in range(5)} == {"first one"}
    assert CaptionRule("all").training(captions, rng) == "first one second third"
    paragraphs = {CaptionRule("paragraph").training(captions, rng) for _ in range(300)}
    assert paragraphs == {
        "first one",
        "second",
        "third",
        "first one second",
        "first one third",
        "second third",
        "first one second third",
    }
    assert CaptionRule("random").evaluation(captions) == list(captions)
    assert CaptionRule("all").evaluation(captions) == list(captions)
    assert CaptionRule("first").evaluation(captions) == ["first one"]
    assert CaptionRule("paragraph").evaluation(captions) == ["first one second third"]


def test_captions_are_cut_after_joining() -> None:
    rule = CaptionRule("paragraph", 12)
    assert rule.evaluation(("first one", "second")) == ["first one se"]
    assert CaptionRule("first", 5).training(("first one",), np.random.default_rng(0)) == "first"
    assert CaptionRule("all", 3).evaluation(("abcdef", "g")) == ["abc", "g"]
    assert CaptionRule("first", 0).evaluation(("x" * 2000,)) == ["x" * 2000]
