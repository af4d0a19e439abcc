from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources import Source, read_source
from frozen_fast.errors import UserError
from support.datasets import manifest_folder, write_manifest

GOOD = {"id": "a", "path": "a.webm", "captions": ["one"], "kind": "video"}


def read(path: Path, **fields: Any) -> Source:
    return read_source(SourceConfig(path=str(path), **fields), "data.sources[0]")


def write(folder: Path, rows: list[Any]) -> Path:
    for name in ("a.webm", "b.webm", "c.png"):
        (folder / name).write_bytes(b"x")
    return write_manifest(folder / "own.jsonl", rows)


def test_every_field_is_read(tmp_path: Path) -> None:
    full = {
        "id": "b",
        "path": "b.webm",
        "captions": ["zwei", "deux"],
        "kind": "video",
        "start_seconds": 1,
        "end_seconds": 2.5,
        "split": "train",
        "twin": "a",
    }
    source = read(write(tmp_path, [GOOD | {"split": "train"}, "", full]))
    first, second = source.clips
    assert (first.id, first.captions, first.start_seconds, first.twin) == ("a", ("one",), None, None)
    assert Path(first.path) == tmp_path / "a.webm"
    assert (second.start_seconds, second.end_seconds, second.split, second.twin) == (1.0, 2.5, "train", "a")
    assert second.captions == ("zwei", "deux") and source.name == "manifest"


def test_absolute_paths_and_byte_order_marks_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD | {"path": str(tmp_path / "a.webm")}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Path(read(path).clips[0].path) == tmp_path / "a.webm"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"own.jsonl:2: not JSON \(.*\): '\{'"),
        ("[1]", r"own.jsonl:2: got \[1\]; allowed: a JSON object"),
        ("1" * 5000, "own.jsonl:2: not JSON"),
        ("[" * 100_000, "own.jsonl:2: not JSON"),
        ({"id": "b"}, "own.jsonl:2: kind: got nothing"),
        (GOOD | {"id": 3}, "own.jsonl:2: id: got 3; allowed: a non-empty string"),
        (GOOD | {"id": " "}, "own.jsonl:2: id: got ' '"),
        (GOOD | {"id": "b", "kind": "vidoe"}, r"own.jsonl:2: kind: got 'vidoe' \(did you mean 'video'\?\)"),
        (GOOD | {"id": "b", "path": ""}, "own.jsonl:2: path: got ''"),
        (GOOD | {"id": "b", "path": "a\0"}, "own.jsonl:2: path: got"),
        ({key: GOOD[key] for key in ("captions", "kind")} | {"id": "b"}, "own.jsonl:2: path: got nothing"),
        (GOOD | {"id": "b", "captions": []}, r"own.jsonl:2: captions: got \[\]; allowed: a list with at least one"),
        (GOOD | {"id": "b", "captions": "text"}, "own.jsonl:2: captions: got 'text'"),
        (GOOD | {"id": "b", "captions": ["x", ""]}, "own.jsonl:2: captions: got"),
        (GOOD | {"id": "b", "captions": ["x\ud800"]}, "own.jsonl:2: captions: got"),
        (GOOD | {"id": "b", "captions": [1]}, "own.jsonl:2: captions: got"),
        (GOOD | {"id": "b", "start_seconds": -1}, "own.jsonl:2: start_seconds: got -1; allowed: seconds"),
        (GOOD | {"id": "b", "start_seconds": "1"}, "own.jsonl:2: start_seconds: got '1'"),
        (GOOD | {"id": "b", "start_seconds": True}, "own.jsonl:2: start_seconds: got True"),
        (GOOD | {"id": "b", "end_seconds": float("nan")}, "own.jsonl:2: end_seconds: got nan"),
        (GOOD | {"id": "b", "end_seconds": float("inf")}, "own.jsonl:2: end_seconds: got inf"),
        (GOOD | {"id": "b", "end_seconds": 10**400}, "own.jsonl:2: end_seconds: got 1000"),
        (GOOD | {"id": "b", "end_seconds": 0}, "own.jsonl:2: end_seconds: got 0; allowed: above start_seconds"),
        (GOOD | {"id": "b", "start_seconds": 2, "end_seconds": 2}, r"got 2; allowed: above start_seconds \(2\)"),
        (GOOD | {"id": "b", "caption": "x"}, r"own.jsonl:2: key: got 'caption' \(did you mean 'captions'\?\)"),
        (GOOD | {"id": "b", "split": 3}, "own.jsonl:2: split: got 3"),
        (GOOD | {"id": "b", "twin": ""}, "own.jsonl:2: twin: got ''"),
        (GOOD | {"id": "b", "twin": "nobody"}, "own.jsonl:2: twin: got 'nobody'; allowed: the id of another line"),
        (GOOD | {"id": "b", "twin": "b"}, "own.jsonl:2: twin: got 'b'"),
        ('{"id": "b", "id": "c"}', "own.jsonl:2: key: got 'id' twice; allowed: each key once"),
        (GOOD | {"id": "b", "path": "a\0"}, "path: got .*; allowed: a non-empty string without NUL characters"),
        (GOOD | {"id": "b", "start_seconds": 2e9}, r"start_seconds: got 2000000000.0; .* seconds, from 0 to 1e\+09"),
        (GOOD | {"id": "b", "kind": "x" * 10_000}, "own.jsonl:2: kind: got 'xxx"),
        (GOOD | {"id": "b", "y" * 10_000: 1}, "own.jsonl:2: key: got 'yyy"),
        ("z" * 1_000_000, "own.jsonl:2: not JSON"),
        (GOOD, "own.jsonl:2: id: got 'a', already on line 1; allowed: unique"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path, [GOOD, row]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    path.write_bytes(b"\x80\x81")
    with pytest.raises(UserError, match="own.jsonl: not UTF-8 text at byte 0"):
        read(path)


def test_missing_and_empty_manifests_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"data.sources\[0\].path: got .*, which is not a file"):
            read(path)
    with pytest.raises(UserError, match="got no lines"):
        read(write(tmp_path, [""]))


def test_a_misspelt_split_is_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["train", "trian", "val", "trian", "test"]
    rows = [GOOD | {"id": str(number), "split": name} for number, name in enumerate(names)]
    source = read(write(tmp_path, rows))
    assert len(source.clips) == 1 and source.drops == {"split 'trian' (did you mean 'train'?)": 2}
    assert "dropped 2 rows: split 'trian' (did you mean 'train'?) (1, 3)" in caplog.text
    assert read(write(tmp_path, rows), split="test").drops == {}


def test_splits(tmp_path: Path) -> None:
    rows = [GOOD | {"split": "train"}, GOOD | {"id": "b", "path": "b.webm", "split": "held-out"}]
    path = write(tmp_path, rows)
    assert [clip.id for clip in read(path).clips] == ["a"]
    assert [clip.id for clip in read(path, split="held-out").clips] == ["b"]
    assert len(read(path, split="").clips) == 2
    with pytest.raises(UserError, match=r"data.sources\[0\].split: got 'test'; allowed: held-out, train"):
        read(path, split="test")
    with pytest.raises(UserError, match="split: missing for id 'b'; allowed: on every line, or on none"):
        read(write(tmp_path, [rows[0], GOOD | {"id": "b"}]))
    assert len(read(write(tmp_path, [GOOD]), split="whatever").clips) == 1


def test_files_that_are_not_there_are_counted(tmp_path: Path) -> None:
    source = read(write(tmp_path, [GOOD, GOOD | {"id": "b", "path": "gone.webm"}]))
    assert len(source) == 1 and source.drops == {"file not on disk": 1}


def test_pictures_among_videos_make_a_source_of_videos(tmp_path: Path) -> None:
    image = GOOD | {"id": "c", "path": "c.png", "kind": "image"}
    source = read(write(tmp_path, [image, GOOD]))
    assert source.kind == "video" and [clip.kind for clip in source.clips] == ["image", "video"]
    assert read(write(tmp_path, [image])).kind == "image"


def test_a_folder_in_place_of_a_file_is_left_to_the_decoder(tmp_path: Path) -> None:
    path = manifest_folder(tmp_path, 2)
    (tmp_path / "clips/c1.webm").unlink()
    (tmp_path / "clips/c1.webm").mkdir()
    assert len(read(path)) == 2
