"""Every layout of config.extensions.layouts: read as published, and broken in the ways that copies on disk break."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frozen_fast.cli.main import main
from frozen_fast.config.extensions import layouts
from frozen_fast.config.fields import to_plain
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.decode.types import ClipError, VideoInfo
from frozen_fast.data.load.training_loader import probe_clip
from frozen_fast.data.sources import Clip, read_source
from frozen_fast.data.sources import annotation_files as causes
from frozen_fast.data.sources.didemo import joined_seconds
from frozen_fast.errors import UserError
from support import data_set_folders as folders
from support.layout_cases import CASES, CLIPS, Case

case_of = pytest.mark.parametrize("case", CASES, ids=[f"{case.layout}-{case.split}-{case.version}" for case in CASES])


def test_every_layout_has_a_case() -> None:
    elsewhere = {"shards", "features"}  # test_shards_damage.py, test_expert_features.py
    assert {case.layout for case in CASES} | elsewhere == set(layouts.names())


def told(case: Case, root: Path, capsys: pytest.CaptureFixture[str], **fields: Any) -> str:
    """The one line that a command prints for this folder; its exit code must be 2."""
    config = root.parent / f"{root.name}.yaml"
    source = to_plain(SourceConfig(**{**case.source(root), **fields}))
    config.write_text(json.dumps({"data": {"sources": [source]}}), encoding="utf-8")
    arguments = ["pack", "--config", str(config), "--output", str(root / "packed"), "--workers", "0"]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " WARNING " not in line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@case_of
def test_reads_the_published_form(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    source = case.read(tmp_path)
    assert sorted(clip.id for clip in source.clips) == sorted(case.ids(written))
    assert source.drops == {} and source.format == case.layout
    assert all(Path(clip.path).is_file() and clip.captions for clip in source.clips)
    for split in set(written) - {"test1k5"}:
        assert len(case.read(tmp_path, split=split)) >= CLIPS - 1, "every split can be read"


@case_of
def test_a_missing_annotation_is_told_with_where_to_get_it(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.writer(tmp_path, CLIPS)
    for path in tmp_path.glob(case.annotation):
        path.unlink()
    line = told(case, tmp_path, capsys)
    assert line.startswith("data.sources[0].path: ") and layouts.load(case.layout).get_from in line
    assert case.layout in ("csv", "manifest", "parquet") or layouts.load(case.layout).get_from


@case_of
def test_a_missing_root_is_told(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = told(case, tmp_path / "nowhere", capsys)
    assert re.match(r"data.sources\[0\].path: got '.*nowhere.*', which is not a f", line)


@case_of
def test_a_missing_clip_is_a_counted_drop(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    gone = next(tmp_path.glob(case.media))
    gone.unlink()
    source = case.read(tmp_path)
    assert source.drops.keys() == {causes.NOT_ON_DISK}
    assert len(source) == len(case.ids(written)) - source.drops[causes.NOT_ON_DISK]


@case_of
def test_a_wrong_split_count_is_told(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    case.writer(tmp_path, CLIPS)
    if not case.published:
        assert case.read(tmp_path, split_counts="error").published is None
        return
    layout = layouts.load(case.layout)
    expected = layout.published[case.version][case.split][0]
    message = f"split {case.split}: the annotation names {CLIPS} clips; {expected:,}"
    assert case.read(tmp_path, split_counts="warn").published == expected
    assert message in caplog.text
    assert case.read(tmp_path, split_counts="error", max_clips=2).published is None
    line = told(case, tmp_path, capsys, split_counts="error")
    assert message in line and line.startswith("data.sources[0].split_counts: ")


def check_drop_or_error(
    case: Case, root: Path, capsys: pytest.CaptureFixture[str], kept: int, cause: str, error: str
) -> None:
    if error:
        assert re.search(error, told(case, root, capsys))
        return
    source = case.read(root)
    assert source.drops == {cause: 1} and len(source) == kept


@case_of
def test_an_absent_id_is_told(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = len(case.ids(case.writer(tmp_path, CLIPS)))
    case.absent(tmp_path)
    check_drop_or_error(case, tmp_path, capsys, kept, case.absent_cause, case.absent_error)


@case_of
def test_a_malformed_annotation_is_told(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.writer(tmp_path, CLIPS)
    case.malformed(tmp_path)
    assert re.search(case.malformed_message, told(case, tmp_path, capsys))


@case_of
def test_a_duplicate_is_told(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = len(case.ids(case.writer(tmp_path, CLIPS)))
    case.duplicate(tmp_path)
    check_drop_or_error(case, tmp_path, capsys, kept, case.duplicate_cause, case.duplicate_error)


def test_files_that_are_gone_do_not_change_the_count_of_a_split(tmp_path: Path) -> None:
    """A partial download is a number of drops; only the annotation decides whether the split is the published one."""
    written = folders.write_msvd(tmp_path, 670)
    for name in written["test"][:600]:
        (tmp_path / "videos" / f"{name}.avi").unlink()
    source = read_source(SourceConfig(format="msvd", path=str(tmp_path), split="test", split_counts="error"))
    assert (len(source), source.published, source.drops) == (70, 670, {causes.NOT_ON_DISK: 600})


@pytest.mark.parametrize("layout", ["msvd", "didemo", "activitynet"])
def test_all_captions_in_their_order_make_the_paragraph(layout: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.layout == layout)
    case.writer(tmp_path, CLIPS)
    clip = case.read(tmp_path, captions="paragraph").clips[0]
    paragraph = {
        "msvd": f"caption 0 of {clip.id} caption 1 of {clip.id} caption 2 of {clip.id}",
        "didemo": f"start of {clip.id} later of {clip.id}",
        "activitynet": "Sentence 0. Sentence 1. Sentence 2.",
    }
    assert case.read(tmp_path, captions="paragraph").caption_rule.evaluation(clip.captions) == [paragraph[layout]]


def test_didemo_with_and_without_moments(tmp_path: Path) -> None:
    folders.write_didemo(tmp_path, CLIPS)
    case = next(case for case in CASES if case.version == "moments")
    assert {clip.segments for clip in case.read(tmp_path).clips} == {((0.0, 5.0), (10.0, 15.0))}
    assert {clip.segments for clip in case.read(tmp_path, split_version="whole").clips} == {()}


def test_frames_of_moments_are_those_inside_them(tmp_path: Path) -> None:
    """10 frames a second for 12 s: 0 to 5 s and 10 to 15 s are frames 0-49 and 100-119; the whole clip is all 120."""
    info = VideoInfo(120, 10.0, 64, 64, "vp9", presentation_seconds=np.arange(120) / 10)
    whole = Clip("a", "a.mov", ("x",))
    moments = replace(whole, segments=((0.0, 5.0), (10.0, 15.0), (20.0, 25.0)))

    def frames(clip: Clip) -> list[int]:
        return list(probe_clip(clip, lambda *_, **__: info, 10**6)[1])

    assert frames(whole) == list(range(120))
    assert frames(moments) == [*range(50), *range(100, 120)]
    with pytest.raises(ClipError, match="begins at 20 s of 12 s"):
        frames(replace(whole, segments=((20.0, 25.0),)))


@pytest.mark.parametrize(
    ("moments", "seconds"),
    [
        ([], ()),
        ([(0, 0)], ((0.0, 5.0),)),
        ([(2, 3), (0, 1)], ((0.0, 20.0),)),
        ([(1, 2), (2, 4)], ((5.0, 25.0),)),
        ([(5, 5), (0, 0), (2, 2)], ((0.0, 5.0), (10.0, 15.0), (25.0, 30.0))),
    ],
)
def test_moments_are_joined(moments: list[tuple[int, int]], seconds: tuple[tuple[float, float], ...]) -> None:
    assert joined_seconds(moments) == seconds


def test_howto100m_joins_five_neighbours(tmp_path: Path) -> None:
    folders.write_howto100m(tmp_path, 3)
    case = next(case for case in CASES if case.layout == "howto100m")
    clips = list(case.read(tmp_path).clips)
    assert [clip.captions[0] for clip in clips] == [
        "word0 word1 word2 word3 word4",
        "word5 word6 word7 word8 word9",
        "word10 word11",
    ]
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [
        pytest.approx((0.0, 0.5)),
        pytest.approx((0.5, 1.0)),
        pytest.approx((1.0, 1.2)),
    ]
    assert len(case.read(tmp_path, split_version="pairs")) == folders.HOWTO_PAIRS


def test_howto100m_reads_speech_video_by_video(tmp_path: Path) -> None:
    folders.write_howto100m(tmp_path, 6)
    case = next(case for case in CASES if case.layout == "howto100m")
    whole = list(case.read(tmp_path).clips)
    speech = json.loads((tmp_path / "caption.json").read_text())
    (tmp_path / "caption.json").unlink()
    for video, pairs in speech.items():
        folders.write_json(tmp_path / "captions" / f"{video}.json", pairs)
    assert list(case.read(tmp_path).clips) == whole


@pytest.mark.parametrize(
    ("layout", "classes", "first"),
    [
        ("ucf101", ("apply eye makeup", "archery", "wall pushups"), "apply eye makeup"),
        ("hmdb51", ("brush hair", "cartwheel"), "brush hair"),
        ("kinetics400", ("abseiling", "air drumming"), "abseiling"),
        ("something_v2", folders.SOMETHING_CLASSES, folders.SOMETHING_CLASSES[0]),
    ],
)
def test_action_recognition_sets_carry_classes(
    layout: str, classes: tuple[str, ...], first: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.layout == layout)
    case.writer(tmp_path, CLIPS)
    source = case.read(tmp_path, max_clips=1)
    assert source.clips[0].label == first
    expected = (first,) if layout == "kinetics400" else classes  # its tables name no class without a clip
    assert source.classes == expected
    assert case.read(tmp_path).classes == classes


def test_coco_folds_are_contiguous_thousands(tmp_path: Path) -> None:
    images = [{"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": "x"}]} for n in range(5000)]
    folders.write_json(tmp_path / "dataset_coco.json", {"images": images})
    for number in range(5000):
        (tmp_path / f"{number}.jpg").touch()
    config = {"format": "coco", "path": str(tmp_path), "split": "test", "split_counts": "error"}
    for fold in (1, 5):
        clips = read_source(SourceConfig(split_version=f"1k-{fold}", **config)).clips
        assert (clips[0].id, clips[-1].id) == (f"{(fold - 1) * 1000}.jpg", f"{fold * 1000 - 1}.jpg")
    with pytest.raises(UserError, match=r"split: got 'train'; allowed: test"):
        read_source(SourceConfig(split_version="1k-1", **{**config, "split": "train"}))


def test_parquet(tmp_path: Path) -> None:
    written = folders.write_parquet(tmp_path, CLIPS)
    case = next(case for case in CASES if case.layout == "parquet")
    assert case.read(tmp_path).kind == "image"
    assert [clip.id for clip in case.read(tmp_path / "part-0.parquet", split="train").clips] == written["train"]
    with pytest.raises(UserError, match=r"columns.path: got 'file'.*allowed: caption, id, path, split"):
        case.read(tmp_path, columns=(("path", "file"),))
    with pytest.raises(UserError, match=r"columns: got 'pth' \(did you mean 'path'\?\)"):
        case.read(tmp_path, columns=(("pth", "path"),))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,x,audio,,", "kind: got 'audio'; allowed: image, video"),
        ("a.mp4,x,,soon,", "start_seconds: got 'soon'"),
        ("a.mp4,x,,3,2", r"end_seconds: got 2; allowed: above start_seconds \(3\)"),
    ],
)
def test_csv_rows_that_break_the_form(row: str, message: str, tmp_path: Path) -> None:
    table = folders.write_lines(tmp_path / "t.csv", ["path,caption,kind,start_seconds,end_seconds", row])
    with pytest.raises(UserError, match=rf"t.csv:2: {message}"):
        read_source(SourceConfig(format="csv", path=str(table)))


def test_csv_fields(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    rows = ["path,caption,label,start_seconds,end_seconds", "a.mp4,someone runs,run,1.5,2.5", ",no path,,,"]
    source = read_source(SourceConfig(format="csv", path=str(folders.write_lines(tmp_path / "t.csv", rows))))
    clip = source.clips[0]
    assert (clip.kind, clip.label, clip.start_seconds, clip.end_seconds) == ("video", "run", 1.5, 2.5)
    assert source.drops == {"no path": 1} and source.classes == ("run",)


def test_unknown_versions_and_splits_are_told() -> None:
    with pytest.raises(UserError, match=r"got '2M'; allowed: nothing, format manifest has splits of one version"):
        read_source(SourceConfig(format="manifest", path="nowhere", split_version="2M"))
    with pytest.raises(UserError, match=r"split_version: got '1kA' \(did you mean '1k-A'\?\)"):
        read_source(SourceConfig(format="msrvtt", path="nowhere", split_version="1kA"))
    for case in CASES:
        if case.layout in ("csv", "manifest", "parquet"):
            continue
        with pytest.raises(UserError, match=r"data.sources\[0\].split_version: got 'v9'"):
            case.read(Path("nowhere"), split_version="v9")
        with pytest.raises(UserError, match=r"data.sources\[0\].split: got 'tst'"):
            case.read(Path("nowhere"), split="tst")
