"""Every layout of config.extensions.layouts: read as published, and broken in the ways that copies on disk break."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frozen_fast.config.extensions import layouts
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.decode.types import ClipError, VideoInfo
from frozen_fast.data.load.training_loader import probe_clip
from frozen_fast.data.sources import Clip, Source, read_source
from frozen_fast.data.sources import annotation_files as causes
from frozen_fast.data.sources.didemo import joined_seconds
from frozen_fast.errors import UserError
from support import data_set_folders as folders

CLIPS = 4
Edit = Callable[[Path], None]


def append(name: str, line: str) -> Edit:
    """Add a line to a list or table."""

    def edit(root: Path) -> None:
        with (root / name).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    return edit


def repeat_last_line(name: str) -> Edit:
    """Add a list's last line once more."""

    def edit(root: Path) -> None:
        append(name, (root / name).read_text(encoding="utf-8").splitlines()[-1])(root)

    return edit


def change_json(name: str, change: Callable[[Any], Any]) -> Edit:
    """Rewrite a JSON file through a function that changes its value in place."""

    def edit(root: Path) -> None:
        value = json.loads((root / name).read_text(encoding="utf-8"))
        change(value)
        (root / name).write_text(json.dumps(value), encoding="utf-8")

    return edit


def write(name: str, content: str | bytes) -> Edit:
    """Replace a file."""

    def edit(root: Path) -> None:
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


UNKNOWN_PICTURE = {"filename": "no.jpg", "split": "test", "sentences": [{"raw": "x"}]}
CC3M_TABLE = "Validation_GCC-1.1.0-Validation-success-020321-VALIDIMG.csv"


@dataclass(frozen=True)
class Case:
    """One layout with what breaks it.

    Attributes:
        layout: name in the table.
        writer: of tests/support/data_set_folders.py.
        split: read.
        annotation: a file without which nothing can be read.
        malformed: breaks an annotation; `malformed_message` is what the error says.
        absent: names a clip that nothing else knows; `absent_cause` is the drop's cause, or the error's text.
        duplicate: names a clip twice; the cause, or the error's text.
        media: a glob of one clip's file.
    """

    layout: str
    writer: folders.Writer
    split: str
    annotation: str
    malformed: Edit
    malformed_message: str
    absent: Edit
    duplicate: Edit
    media: str
    version: str = ""
    absent_cause: str = causes.NO_CAPTION
    duplicate_cause: str = causes.DUPLICATE_ID
    path: str = "."
    fields: dict[str, Any] = field(default_factory=dict)
    published: bool = True

    def read(self, root: Path, **fields: Any) -> Source:
        """Read the folder, with the count of the split unchecked unless told otherwise."""
        values = {"split": self.split, "split_version": self.version, "split_counts": "off", **self.fields, **fields}
        return read_source(SourceConfig(format=self.layout, path=str(root / self.path), **values), "data.sources[0]")


CASES = [
    Case(
        "msvd",
        folders.write_msvd,
        "test",
        "structured-symlinks/raw-captions.pkl",
        write("structured-symlinks/raw-captions.pkl", pickle.dumps({"vid8": "text"})),
        "'vid8'.*a list of lists",
        append("structured-symlinks/test_list.txt", "nobody"),
        repeat_last_line("structured-symlinks/test_list.txt"),
        "videos/vid8.avi",
    ),
    Case(
        "msvd",
        folders.write_msvd_clip4clip,
        "train",
        "msvd_data/train_list.txt",
        write("msvd_data/raw-captions.pkl", b"\x80"),
        "not a pickle",
        append("msvd_data/train_list.txt", "nobody"),
        repeat_last_line("msvd_data/train_list.txt"),
        "MSVD_Videos/vid0.mp4",
    ),
    Case(
        "didemo",
        folders.write_didemo,
        "test",
        "test_data.json",
        change_json("test_data.json", lambda rows: rows[3].update(times=[[2, 1]])),
        r"\[3\].times: got \[2, 1\]",
        append("test_list.txt", "nobody.mov"),
        repeat_last_line("test_list.txt"),
        "videos/48@N00.mov",
        "whole",
    ),
    Case(
        "didemo",
        folders.write_didemo,
        "val",
        "val_list.txt",
        change_json("val_data.json", lambda rows: rows[0].pop("description")),
        r"\[0\].description: got None",
        append("val_list.txt", "nobody.mov"),
        repeat_last_line("val_list.txt"),
        "videos/44@N00.mov",
        "moments",
    ),
    Case(
        "lsmdc",
        folders.write_lsmdc,
        "test",
        "frame_tar_list.txt",
        write("structured-symlinks/raw-captions.pkl", pickle.dumps([1])),
        "got list; allowed: a dict",
        append("structured-symlinks/test_list.txt", "nobody"),
        repeat_last_line("structured-symlinks/test_list.txt"),
        "videos/*/1004_Juno_00.8.avi",
    ),
    Case(
        "lsmdc_clip4clip",
        folders.write_lsmdc_clip4clip,
        "test",
        "LSMDC16_challenge_1000_publictect.csv",
        append("LSMDC16_challenge_1000_publictect.csv", "clip\tonly three\tcolumns"),
        ":5: got 3 columns; allowed: 6",
        append("LSMDC16_challenge_1000_publictect.csv", "nobody\t0\t0\t0\t0\tSOMEONE leaves."),
        lambda root: None,
        "LSMDC_Videos/*/1004_Juno_00.8.mp4",
        absent_cause=causes.NOT_ON_DISK,
        duplicate_cause="",
    ),
    Case(
        "activitynet",
        folders.write_activitynet,
        "val",
        "val_1.json",
        change_json("val_1.json", lambda value: value["v_act4"].update(sentences="one text")),
        "v_act4.sentences: got",
        change_json("val_ids.json", lambda ids: ids.append("v_nobody")),
        change_json("val_ids.json", lambda ids: ids.append(ids[0])),
        "Activity_Videos/act4.mp4",
    ),
    Case(
        "vatex",
        folders.write_vatex,
        "test",
        "test1k5_sec_list.txt",
        change_json("vatex_data.json", lambda value: value["abc_0008"].update(enCap=[1])),
        "abc_0008.enCap: got",
        append("test1k5_sec_list.txt", "nobody"),
        repeat_last_line("test1k5_sec_list.txt"),
        "videos/abc_0008.mp4",
        "1k5",
    ),
    Case(
        "flickr30k",
        folders.write_flickr30k,
        "test",
        "dataset_flickr30k.json",
        change_json("dataset_flickr30k.json", lambda value: value["images"][8].update(sentences=["text"])),
        "108.jpg: sentences: got",
        change_json("dataset_flickr30k.json", lambda value: value["images"].append(UNKNOWN_PICTURE)),
        change_json("dataset_flickr30k.json", lambda value: value["images"].append(value["images"][-1])),
        "flickr30k-images/108.jpg",
        absent_cause=causes.NOT_ON_DISK,
    ),
    Case(
        "coco",
        folders.write_coco,
        "test",
        "dataset_coco.json",
        write("dataset_coco.json", '{"images": [{"filename": 3}]}'),
        r"images\[0\].filename: got 3",
        change_json("dataset_coco.json", lambda value: value["images"].append(UNKNOWN_PICTURE)),
        change_json("dataset_coco.json", lambda value: value["images"].append(value["images"][-1])),
        "val2014/COCO_val2014_000000000018.jpg",
        "5k",
        absent_cause=causes.NOT_ON_DISK,
    ),
    Case(
        "howto100m",
        folders.write_howto100m,
        "train",
        "HowTo100M_v1.csv",
        change_json("caption.json", lambda value: value["how0"]["start"].pop()),
        "how0: got no equally long lists",
        append("HowTo100M_v1.csv", "nobody,1,1,a,b"),
        repeat_last_line("HowTo100M_v1.csv"),
        "videos/how0.webm",
        "joined-5",
        absent_cause="no speech",
        duplicate_cause="duplicate video",
        published=False,
    ),
    Case(
        "ucf101",
        folders.write_ucf101,
        "test",
        "ucfTrainTestlist/classInd.txt",
        append("ucfTrainTestlist/classInd.txt", "NoNumber"),
        "classInd.txt:4: got 'NoNumber'",
        append("ucfTrainTestlist/testlist01.txt", "Unknown/v.avi"),
        repeat_last_line("ucfTrainTestlist/testlist01.txt"),
        "UCF-101/Archery/v_Archery_g01_c01.avi",
        "1",
        absent_cause="allowed: Class/video.avi with a class",
    ),
    Case(
        "hmdb51",
        folders.write_hmdb51,
        "test",
        "testTrainMulti_7030_splits/*_test_split2.txt",
        append("testTrainMulti_7030_splits/cartwheel_test_split2.txt", "video.avi 7"),
        "got 'video.avi 7'",
        append("testTrainMulti_7030_splits/cartwheel_test_split2.txt", "nobody.avi 2"),
        append("testTrainMulti_7030_splits/cartwheel_test_split2.txt", "cartwheel_test_1.avi 2"),
        "hmdb51_org/cartwheel/cartwheel_test_1.avi",
        "2",
        absent_cause=causes.NOT_ON_DISK,
    ),
    Case(
        "kinetics400",
        folders.write_kinetics400,
        "val",
        "val.csv",
        append("val.csv", "abseiling,id,soon,later,val"),
        r"val.csv:6: got 'abseiling, id, soon, later'",
        append("val.csv", "abseiling,nobody,1,2,val"),
        repeat_last_line("val.csv"),
        "val/abseiling/kin10_000002_000012.mp4",
        absent_cause=causes.NOT_ON_DISK,
        published=False,
    ),
    Case(
        "something_v2",
        folders.write_something_v2,
        "val",
        "labels/labels.json",
        change_json("labels/validation.json", lambda rows: rows[0].update(template="Eating [something]")),
        r"\[0\].template: got 'Eating \[something\]'; allowed: a class of labels.json",
        change_json("labels/validation.json", lambda rows: rows.append({**rows[0], "id": "nobody"})),
        change_json("labels/validation.json", lambda rows: rows.append(rows[0])),
        "20bn-something-something-v2/74.webm",
        absent_cause=causes.NOT_ON_DISK,
    ),
    Case(
        "csv",
        folders.write_csv,
        "test",
        "table.tsv",
        write("table.tsv", "file\tother\n1\t2\n"),
        "'text'.*allowed",
        append("table.tsv", "pictures/nobody.jpg\tnot there\ttest"),
        repeat_last_line("table.tsv"),
        "pictures/pic4.jpg",
        path="table.tsv",
        absent_cause=causes.NOT_ON_DISK,
        published=False,
        fields={"columns": (("path", "file"), ("caption", "text"))},
    ),
    Case(
        "webvid",
        folders.write_webvid_splits,
        "val",
        "metadata/results_2M_val.csv",
        write("metadata/results_2M_val.csv", "videoid,name\n1,x\n"),
        "missing column page_dir",
        append("metadata/results_2M_val.csv", "77,u,d,000000_000000,not there"),
        repeat_last_line("metadata/results_2M_val.csv"),
        "videos/000000_000000/1000.mp4",
        "2M",
        absent_cause=causes.NOT_ON_DISK,
        published=False,
    ),
    Case(
        "cc3m",
        folders.write_cc3m_splits,
        "val",
        CC3M_TABLE,
        write(CC3M_TABLE, b"\xff\xfe\x00"),
        "not UTF-8|missing column",
        append(CC3M_TABLE, "nowhere.jpg,not there"),
        repeat_last_line(CC3M_TABLE),
        "validation/*",
        absent_cause=causes.NOT_ON_DISK,
        published=False,
    ),
]
case_of = pytest.mark.parametrize("case", CASES, ids=[f"{case.layout}-{case.split}-{case.version}" for case in CASES])


def expected_ids(case: Case, written: folders.Ids) -> list[str]:
    return written["test1k5" if case.version == "1k5" else case.split]


def test_every_layout_has_a_case() -> None:
    elsewhere = {"manifest", "shards", "parquet", "msrvtt", "msrvtt_clip4clip"}  # test_sources, test_shards, below
    elsewhere |= {"features"}  # test_expert_features
    assert {case.layout for case in CASES} | elsewhere == set(layouts.names())


@case_of
def test_reads_the_published_form(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    source = case.read(tmp_path)
    assert sorted(clip.id for clip in source.clips) == sorted(expected_ids(case, written))
    assert source.drops == {} and source.format == case.layout
    assert all(Path(clip.path).is_file() and clip.captions for clip in source.clips)
    for split in set(written) - {"test1k5"}:
        assert len(case.read(tmp_path, split=split)) >= CLIPS - 1, "every split can be read"


@case_of
def test_a_missing_annotation_is_told_with_where_to_get_it(case: Case, tmp_path: Path) -> None:
    case.writer(tmp_path, CLIPS)
    for path in tmp_path.glob(case.annotation):
        path.unlink()
    with pytest.raises(UserError) as error:
        case.read(tmp_path)
    told = str(error.value)
    assert "\n" not in told and told.startswith("data.sources[0].path: ")
    assert layouts.load(case.layout).get_from in told
    assert case.layout == "csv" or layouts.load(case.layout).get_from


@case_of
def test_a_missing_root_is_told(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources\[0\].path: got '.*nowhere.*', which is not a f"):
        case.read(tmp_path / "nowhere")


@case_of
def test_a_missing_clip_is_a_counted_drop(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    gone = next(tmp_path.glob(case.media))
    gone.unlink()
    source = case.read(tmp_path)
    assert source.drops.keys() == {causes.NOT_ON_DISK}
    assert len(source) == len(expected_ids(case, written)) - source.drops[causes.NOT_ON_DISK]


@case_of
def test_a_wrong_split_count_is_told(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case.writer(tmp_path, CLIPS)
    if not case.published:
        assert case.read(tmp_path, split_counts="error").published is None
        return
    layout = layouts.load(case.layout)
    expected = layout.published[case.version][case.split][0]
    message = f"split {case.split}: the annotation names {CLIPS} clips; {expected:,}"
    with pytest.raises(UserError) as error:
        case.read(tmp_path, split_counts="error")
    assert message in str(error.value) and str(error.value).startswith("data.sources[0].split_counts: ")
    caplog.clear()
    assert case.read(tmp_path, split_counts="warn").published == expected
    assert message in caplog.text
    assert case.read(tmp_path, split_counts="error", max_clips=2).published is None


@case_of
def test_an_absent_id_is_told(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    case.absent(tmp_path)
    if case.absent_cause.startswith("allowed"):
        with pytest.raises(UserError, match=case.absent_cause):
            case.read(tmp_path)
        return
    source = case.read(tmp_path)
    assert source.drops == {case.absent_cause: 1}
    assert len(source) == len(expected_ids(case, written))


@case_of
def test_a_malformed_annotation_is_told(case: Case, tmp_path: Path) -> None:
    case.writer(tmp_path, CLIPS)
    case.malformed(tmp_path)
    with pytest.raises(UserError, match=case.malformed_message) as error:
        case.read(tmp_path)
    assert "\n" not in str(error.value)


@case_of
def test_a_duplicate_is_a_counted_drop(case: Case, tmp_path: Path) -> None:
    written = case.writer(tmp_path, CLIPS)
    case.duplicate(tmp_path)
    source = case.read(tmp_path)
    assert len(source) == len(expected_ids(case, written))
    assert source.drops == ({case.duplicate_cause: 1} if case.duplicate_cause else {})


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
    pytest.importorskip("pyarrow")
    written = folders.write_parquet(tmp_path, CLIPS)

    def read(**fields: Any) -> Source:
        values = {"path": str(tmp_path), "split": "test", **fields}
        return read_source(SourceConfig(format="parquet", **values), "data.sources[0]")

    assert [clip.id for clip in read().clips] == written["test"] and read().kind == "image"
    assert len(read(path=str(tmp_path / "part-0.parquet"), split="train")) == CLIPS
    with pytest.raises(UserError, match=r"columns.path: got 'file'.*allowed: caption, id, path, split"):
        read(columns=(("path", "file"),))
    with pytest.raises(UserError, match=r"columns: got 'pth' \(did you mean 'path'\?\)"):
        read(columns=(("pth", "path"),))
    (tmp_path / "pictures" / f"{written['test'][0]}.jpg").unlink()
    assert read().drops == {causes.NOT_ON_DISK: 1}
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"part-1.parquet: not a parquet file"):
        read()


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
        if case.layout == "csv":
            continue
        with pytest.raises(UserError, match=r"data.sources\[0\].split_version: got 'v9'"):
            case.read(Path("nowhere"), split_version="v9")
        with pytest.raises(UserError, match=r"data.sources\[0\].split: got 'tst'"):
            case.read(Path("nowhere"), split="tst")
