"""benchmarks/student.py at a tiny size: both students of a teacher, resumed, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import student
from frozen_fast.config import config_from_mapping, load_config
from frozen_fast.training.run import train
from support.runs import losses, make_data, read_json, tiny_mapping, without_reports


def test_the_students_differ_in_their_teacher_only(tmp_path: Path) -> None:
    options = student.parse_arguments(["--teacher", str(tmp_path / "teacher"), "--steps", "5", "model.expansion=zero"])
    (tmp_path / "e.yaml").write_text("name: e\n", encoding="utf-8")
    plain, distilled = (
        load_config(str(tmp_path / "e.yaml"), student.overrides_of(options, kind, 3, 8)) for kind in student.KINDS
    )
    assert plain.curriculum == distilled.curriculum and plain.seed == distilled.seed == 3
    assert plain.curriculum.stages[0].steps == 5 and not plain.distillation.teachers
    (teacher,) = distilled.distillation.teachers
    assert (teacher.checkpoint, teacher.frames) == (str(tmp_path / "teacher"), 8)


def test_means_are_over_the_seeds_of_a_kind() -> None:
    runs = [
        {"kind": kind, "seed": seed, "hours": hours, "frames": 1, "metrics": {"t2v/R@1": recall}}
        for kind, seed, hours, recall in (("plain", 0, 1.0, 10.0), ("plain", 1, 3.0, 30.0), ("distilled", 0, 2.0, 5.0))
    ]
    plain, distilled = student.summary(runs)
    assert plain["hours"] == pytest.approx((2.0, 2**0.5)) and plain["metrics"]["t2v/R@1"][0] == 20.0
    assert (distilled["seeds"], distilled["hours"]) == (1, (2.0, 0.0))


@pytest.mark.slow
def test_trains_both_students_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_data(tmp_path / "data", videos=8, pictures=1)
    source = {"name": "clips", "path": str(files["videos"])}
    mapping = tiny_mapping(
        files,
        tmp_path / "teacher",
        curriculum={"stages": [{"frames": 2, "global_batch_size": 4, "steps": 2}]},
        evaluation={"every": "end", "sources": [source], "stride_seconds": 0},
    )
    with without_reports():
        assert train(config_from_mapping(mapping)) == 0
    output = tmp_path / "student.json"
    arguments = ["--teacher", str(tmp_path / "teacher"), "--steps", "2", "--batch-size", "4", "--seeds", "0"]
    arguments += ["--work", str(tmp_path / "work"), "--output", str(output)]
    assert student.main(arguments) == 0
    result = read_json(output)
    assert [(row["kind"], row["frames"]) for row in result["rows"]] == [("teacher", 2), ("plain", 1), ("distilled", 1)]
    assert all(run["hours"] > 0 and "t2v/R@1" in run["metrics"] for run in result["runs"])
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    first, second = (losses(tmp_path / "work" / f"{kind}_seed0") for kind in student.KINDS)
    assert second[0] > first[0], "the teacher's loss comes on top"
    before = (tmp_path / "work" / "plain_seed0" / "steps.jsonl").stat().st_mtime_ns
    assert student.main(arguments) == 0
    assert (tmp_path / "work" / "plain_seed0" / "steps.jsonl").stat().st_mtime_ns == before
    assert "distilled, 1 frames:" in capsys.readouterr().out
