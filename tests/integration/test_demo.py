"""The demo in small: a few rendered clips through train.py and configs/demo.yaml, 1 => 4 => 8 frames, to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import demo_result
import render_demo
from frozen_fast.common.files import read_json_lines
from support.runs import REPOSITORY, environment

pytestmark = pytest.mark.integration

STAGES = ", ".join(f"{{frames: {frames}, global_batch_size: 6, steps: 3}}" for frames in (1, 4, 8))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run's folder and the overrides that it was started with."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = render_demo.Recipe(train_pairs=10, test_pairs=10, stills=8)
    render_demo.render_set(folder / "data", recipe, processes=1)
    overrides = [
        f"run_folder={folder / 'run'}",
        f"data.sources[0].path={folder / 'data' / 'train_videos.jsonl'}",
        f"data.sources[1].path={folder / 'data' / 'train_images.jsonl'}",
        f"evaluation.sources[0].path={folder / 'data' / 'test.jsonl'}",
        "model.video.size=pico_patch16_32",
        f"curriculum.stages=[{STAGES}]",
        "optimizer.warmup_steps=1",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    command += ["train.py", "--config", "configs/demo.yaml", *overrides]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run", overrides


def test_the_curriculum_reaches_the_report(finished: tuple[Path, list[str]]) -> None:
    run, _ = finished
    steps = read_json_lines(run / "steps.jsonl")
    assert [row["frames"] for row in steps if row["source"] == "videos"] == sorted(
        row["frames"] for row in steps if row["source"] == "videos"
    )
    assert {row["stage"] for row in steps} == {0, 1, 2} and len(steps) == 9
    assert {row["source"] for row in steps} == {"videos", "stills"}
    assert len({row["loss"] for row in steps}) == len(steps)
    assert not (run / "bad_clips.jsonl").exists() or not read_json_lines(run / "bad_clips.jsonl")
    evaluations = json.loads((run / "metrics.json").read_text())["evaluations"]
    assert [row["frames"] for row in evaluations] == [1, 4, 8]
    assert all(row["num_videos"] == 20 and row["metrics"]["one_frame_ceiling"] == 50.0 for row in evaluations)
    assert len({row["metrics"]["t2v/MnR"] for row in evaluations}) > 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Twins" in page and "one frame at best" in page


def test_clips_come_through_dali(finished: tuple[Path, list[str]]) -> None:
    found = json.loads((finished[0] / "environment.json").read_text())
    assert "dali" in json.dumps(found["decode_backends"])


def test_the_result_is_told_in_a_few_lines(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, overrides = finished
    here = os.getcwd()
    os.chdir(REPOSITORY)
    try:
        assert demo_result.main(["configs/demo.yaml", *overrides]) == 0
        assert demo_result.main(["configs/demo.yaml", *overrides, f"run_folder={run / 'none'}"]) == 2
    finally:
        os.chdir(here)
    told = capsys.readouterr()
    assert [line.split(":")[0].strip() for line in told.out.splitlines() if "stage" in line] == [
        "stage 1 (1 frame )",
        "stage 2 (4 frames)",
        "stage 3 (8 frames)",
    ]
    assert "at best from one frame: R@1  50.0 %" in told.out
    assert f"report: {run / 'report.html'}" in told.out
    assert "error: run_folder: got" in told.err and len(told.err.splitlines()) == 1
