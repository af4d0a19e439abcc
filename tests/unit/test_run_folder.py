"""A run folder: what counts as a run, what is cut off on resuming, what rows replace."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from frozen_fast.common.files import read_json_lines, write_atomically
from frozen_fast.errors import UserError
from frozen_fast.records import run_folder as run_folder_module
from frozen_fast.records.run_folder import RunFolder


def filled(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.append_steps([{"step": step, "stage": 0 if step <= 3 else 1} for step in range(1, 7)])
    folder.append_bad_clips(
        [
            {"step": 2, "clip_id": "a", "replaced_by": "c"},
            {"step": 3, "clip_id": "of the evaluation", "replaced_by": None},
            {"step": 5, "clip_id": "b", "replaced_by": "c"},
            {"step": 6, "clip_id": "of the last evaluation", "replaced_by": None},
        ]
    )
    folder.add_evaluations([{"step": 3, "stage": 0}])
    folder.add_evaluations([{"step": 6, "stage": 1}])
    folder.put_stage_row({"stage": 0, "steps": 3})
    folder.put_stage_row({"stage": 1, "steps": 3})
    return folder


def content(folder: RunFolder) -> tuple[list[int], list[str], list[int], list[int]]:
    return (
        [row["step"] for row in read_json_lines(folder.steps)],
        [row["clip_id"] for row in read_json_lines(folder.bad_clips)],
        [row["step"] for row in folder.evaluations()],
        [row["stage"] for row in folder.stage_rows()],
    )


def test_an_empty_folder_is_no_run_and_a_step_makes_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_a_run()
    folder.create()
    folder.refuse_to_overwrite()
    folder.append_steps([{"step": 1}])
    with pytest.raises(UserError, match="already contains a run; allowed: --resume auto"):
        folder.refuse_to_overwrite()


@pytest.mark.parametrize(
    ("step", "stage", "stage_complete", "expected"),
    [
        (5, 1, False, ([1, 2, 3, 4, 5], ["a", "of the evaluation", "b"], [3], [0])),
        (3, 0, True, ([1, 2, 3], ["a", "of the evaluation"], [3], [0])),
        (2, 0, False, ([1, 2], ["a"], [], [])),
        (0, 0, False, ([], [], [], [])),
        (6, 1, True, (list(range(1, 7)), ["a", "of the evaluation", "b", "of the last evaluation"], [3, 6], [0, 1])),
    ],
)
def test_cutting_back_leaves_what_the_checkpoint_knows(tmp_path: Path, step, stage, stage_complete, expected) -> None:
    folder = filled(tmp_path)
    folder.cut_back(step, stage, stage_complete=stage_complete)
    assert content(folder) == expected


def test_an_evaluation_without_its_stage_row_is_done_again(tmp_path: Path) -> None:
    """Killed between the two writes: the evaluation goes, so that it cannot stand twice."""
    folder = filled(tmp_path)
    folder.stages.write_text(json.dumps([{"stage": 0, "steps": 3}]), encoding="utf-8")
    folder.cut_back(6, 1, stage_complete=True)
    assert content(folder)[1:] == (["a", "of the evaluation", "b"], [3], [0])


@pytest.mark.parametrize("evaluated", [True, False])
def test_an_evaluation_inside_a_stage_stands_if_the_checkpoint_knows_of_it(tmp_path: Path, evaluated: bool) -> None:
    folder = filled(tmp_path)
    folder.add_evaluations([{"step": 5, "stage": 1}])
    folder.append_bad_clips([{"step": 5, "clip_id": "of the epoch", "replaced_by": None}])
    folder.cut_back(5, 1, stage_complete=False, evaluated=evaluated)
    extra = ["of the epoch"] if evaluated else []
    assert content(folder)[1:3] == (["a", "of the evaluation", "b", *extra], [3, 5] if evaluated else [3])


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    with folder.steps.open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "sta')
    folder.cut_back(6, 1, stage_complete=True)
    folder.append_steps([{"step": 7, "stage": 1}])
    assert [row["step"] for row in read_json_lines(folder.steps)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_stage_row_replaces_its_earlier_self(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    folder.put_stage_row({"stage": 0, "steps": 30})
    assert folder.stage_rows() == [{"stage": 0, "steps": 30}, {"stage": 1, "steps": 3}]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="^run_folder: got .*file/run.*; allowed: a folder that can be written to"):
        RunFolder(tmp_path / "file" / "run").create()


def test_status_names_the_step_and_the_exit_code(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("stopped", step=4, stage=1, exit_code=75, message="SIGTERM")
    status = json.loads(folder.status.read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"], status["step"], status["stage"]) == ("stopped", 75, 4, 1)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.json", b"{", "metrics.json cannot be read: renamed to metrics.damaged_1.json"),
        ("metrics.json", b'{"evaluations": [{"metrics": {}}]}', "metrics.json cannot be read"),
        ("stages.json", b"[1, 2]", "stages.json cannot be read: renamed to stages.damaged_1.json"),
        ("stages.json", b"\xff\xfe\x00", "stages.json cannot be read"),
        ("environment.json", b"[" * 100_000, "environment.json cannot be read"),
        ("steps.jsonl", b'{"step": 1, "stage": 0}\n\0\0\0\0\n{"step": "x"}\n', "steps.jsonl: 2 unreadable line"),
        ("bad_clips.jsonl", b'{"step": 1}\n[]\n', "bad_clips.jsonl: 1 unreadable line"),
        ("steps.jsonl", b'{"step": 1, "stage": 0}\n{"step": 2, "st', "steps.jsonl: 1 unreadable line"),
    ],
)
def test_damaged_files_are_kept_aside_and_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    folder = filled(tmp_path)
    folder.write_status("running", step=0, stage=0)
    (tmp_path / name).write_bytes(content)
    lines = folder.repair()
    assert len(lines) == 1 and lines[0].startswith(told)
    aside = next(tmp_path.glob("*.damaged_1.*"))
    assert aside.read_bytes() == content
    folder.cut_back(2, 0, stage_complete=False)
    folder.update_environment(a=1)
    assert folder.repair() == []


class FullDisk:
    """A disk that refuses to be written to, for as long as `full` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        write = os.write

        def refuse(descriptor: int, data: bytes) -> int:
            if self.full and write(descriptor, data[:3]):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", refuse)
        monkeypatch.setattr(run_folder_module, "write_atomically", self._write_atomically)

    def _write_atomically(self, path: Path, content: str) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content)


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path)
    before = content(folder)
    disk = FullDisk(monkeypatch)
    folder.append_steps([{"step": 7, "stage": 1}])
    folder.add_evaluations([{"step": 7, "stage": 1}])
    folder.put_stage_row({"stage": 2, "steps": 1})
    assert [row["step"] for row in folder.evaluations()] == [3, 6, 7]
    assert [row["step"] for row in read_json_lines(folder.steps)] == before[0], "a part of a row is cut off again"
    assert len(folder.write_pending()) == 3
    disk.full = False
    folder.append_steps([{"step": 8, "stage": 1}])
    assert folder.write_pending() == []
    assert content(folder)[0] == [*before[0], 7, 8]
    assert [row["stage"] for row in json.loads(folder.stages.read_text())] == [0, 1, 2]


def test_a_full_disk_takes_a_new_status_in_the_old_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("running", step=1000, stage=10, message="x" * 200)

    def refuse(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder_module, "write_atomically", refuse)
    size = folder.status.stat().st_size
    folder.write_status("failed", step=2, stage=0, exit_code=1)
    assert json.loads(folder.status.read_text())["state"] == "failed"
    assert folder.status.stat().st_size == size


def test_a_heartbeat_renews_the_status_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.beat()
    assert not folder.status.exists()
    folder.write_status("running", step=1, stage=0, checkpoint=1)
    first = json.loads(folder.status.read_text())
    folder.beat()
    second = json.loads(folder.status.read_text())
    assert second.pop("heartbeat") > first.pop("heartbeat") and second == first and first["checkpoint"] == 1
