"""The layouts of config.extensions.layouts, each with what breaks a copy on disk in five ways."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources import Source, read_source
from frozen_fast.data.sources import annotation_files as causes
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


def add_parquet_row(name: str, path: str) -> Edit:
    """Add a file with one row to a folder of parquet files."""

    def edit(root: Path) -> None:
        folders.write_parquet_file(root / "part-2.parquet", [name], [path], "test")

    return edit


UNKNOWN_PICTURE = {"filename": "no.jpg", "split": "test", "sentences": [{"raw": "x"}]}
MSRVTT_LISTS = "high-quality/structured-symlinks"
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
        absent: names a clip that nothing else knows: a drop by `absent_cause`, or an error that `absent_error` matches.
        duplicate: names a clip twice: a drop by `duplicate_cause`, or an error that `duplicate_error` matches.
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
    absent_error: str = ""
    duplicate_cause: str = causes.DUPLICATE_ID
    duplicate_error: str = ""
    path: str = "."
    fields: dict[str, Any] = field(default_factory=dict)
    published: bool = True

    def source(self, root: Path) -> dict[str, Any]:
        """The source's section of a config, with the count of the split unchecked."""
        values = {"split": self.split, "split_version": self.version, "split_counts": "off", **self.fields}
        return {"format": self.layout, "path": str(root / self.path), **values}

    def read(self, root: Path, **fields: Any) -> Source:
        """Read the folder; `fields` replace those of `source`."""
        return read_source(SourceConfig(**{**self.source(root), **fields}), "data.sources[0]")

    def ids(self, written: Mapping[str, list[str]]) -> list[str]:
        """The ids of the case's split among those that the writer returned."""
        return written["test1k5" if self.version == "1k5" else self.split]


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
        repeat_last_line("LSMDC16_challenge_1000_publictect.csv"),
        "LSMDC_Videos/*/1004_Juno_00.8.mp4",
        absent_cause=causes.NOT_ON_DISK,
        duplicate_cause="duplicate sentence",
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
        absent_error="testlist01.txt:5: got .*allowed: Class/video.avi with a class",
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
    Case(
        "msrvtt",
        folders.write_msrvtt_splits,
        "test",
        f"{MSRVTT_LISTS}/jsfusion_val_caption_idx.pkl",
        change_json("annotation/MSR_VTT.json", lambda value: value["annotations"][2].update(caption=None)),
        r"MSR_VTT.json: annotations\[2\].caption: got None",
        append(f"{MSRVTT_LISTS}/val_list_jsfusion.txt", "nobody"),
        repeat_last_line(f"{MSRVTT_LISTS}/val_list_jsfusion.txt"),
        "videos/all/video5.mp4",
        "1k-A",
    ),
    Case(
        "msrvtt_clip4clip",
        folders.write_msrvtt_clip4clip_splits,
        "train",
        "msrvtt_data/MSRVTT_data.json",
        change_json("msrvtt_data/MSRVTT_data.json", lambda value: value["sentences"][1].update(video_id=7)),
        r"MSRVTT_data.json: sentences\[1\].video_id: got 7",
        append("msrvtt_data/MSRVTT_train.9k.csv", "nobody"),
        repeat_last_line("msrvtt_data/MSRVTT_train.9k.csv"),
        "MSRVTT_Videos/video0.mp4",
        "1k-A",
    ),
    Case(
        "manifest",
        folders.write_manifest_splits,
        "test",
        "manifest.jsonl",
        append("manifest.jsonl", '{"id": "x"}'),
        "manifest.jsonl:9: kind: got nothing",
        append("manifest.jsonl", folders.manifest_line("nobody", "test")),
        repeat_last_line("manifest.jsonl"),
        "clips/clip4.webm",
        path="manifest.jsonl",
        absent_cause=causes.NOT_ON_DISK,
        duplicate_error="manifest.jsonl:9: id: got 'clip7', already on line 8; allowed: unique",
        published=False,
    ),
    Case(
        "parquet",
        folders.write_parquet,
        "test",
        "*.parquet",
        write("part-1.parquet", "PAR1 no table"),
        "part-1.parquet: not a parquet file",
        add_parquet_row("nobody", "pictures/nobody.jpg"),
        add_parquet_row("pic5", "pictures/pic5.jpg"),
        "pictures/pic4.jpg",
        absent_cause=causes.NOT_ON_DISK,
        published=False,
    ),
]
