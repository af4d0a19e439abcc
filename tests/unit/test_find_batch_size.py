"""The largest batch that fits: the search against every cut-off, and real trials under a memory limit."""

from __future__ import annotations

import json
import re
from functools import partial
from operator import ge
from pathlib import Path

import pytest
import yaml

from frozen_fast.cli import main
from frozen_fast.report.write_report import write_report
from frozen_fast.sweep import batch_size
from frozen_fast.sweep.batch_size import Attempt, largest_that_fits
from support.towers import make_text_tower


@pytest.mark.parametrize("start", [1, 8, 100])
def test_the_search_finds_every_cut_off_and_asks_nothing_twice(start: int) -> None:
    for most in (100, 130):
        for cut in range(most + 20):
            asked: list[int] = []

            def fits(size: int, cut: int = cut, asked: list[int] = asked) -> bool:
                asked.append(size)
                return size <= cut

            assert largest_that_fits(fits, start=start, most=most, tolerance=0.0) == min(cut, most)
            assert len(set(asked)) == len(asked) <= 2 * 8 + 1 and max(asked) <= most


def test_a_tolerance_saves_trials_and_is_kept() -> None:
    for cut in range(1, 500):
        found = largest_that_fits(partial(ge, cut), start=8, most=4096, tolerance=0.1)
        assert found <= cut <= found + max(1, int(0.1 * found))


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    tower = make_text_tower(tmp_path / "tower")
    path = tmp_path / "experiment.yaml"
    tree = {
        "name": "batches",
        "run_folder": str(tmp_path / "run"),
        "model": {"video": {"size": "nano_patch8_64", "attention": "sdpa"}, "text": {"name": str(tower)}},
        "curriculum": {"stages": [{"frames": 8, "global_batch_size": 4, "steps": 1}]},
        "training": {"device": "cpu", "precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.slow
def test_trials_end_at_the_memory_limit_and_the_report_shows_what_fitted(experiment: Path, tmp_path: Path) -> None:
    limits = ["--start", "16", "--most", "4096", "--tolerance", "1", "--memory-gib", "1.6"]
    overrides = ["model.text.max_tokens=16"]
    assert main(["find-batch-size", "--config", str(experiment), *limits, *overrides]) == 0
    found = json.loads((tmp_path / "run/batch_sizes.json").read_text())
    (row,) = found["rows"]
    causes = {attempt["batch_size"]: attempt["cause"] for attempt in row["attempts"]}
    assert causes.pop(2 * row["batch_size"]) == "out_of_memory" and set(causes.values()) == {"ok"}
    assert max(causes) == row["batch_size"] >= 4
    assert 0 < row["peak_memory_bytes"] < 1.6 * 2**30 and row["clips_per_second"] > 0
    (tmp_path / "run/config.yaml").write_text(experiment.read_text(), encoding="utf-8")
    report = write_report(tmp_path / "run")[0].read_text()
    section = report.split("## Largest batches")[1].split("##")[0]
    assert re.search(rf"^\| *8 *\| *{row['batch_size']} *\|", section, re.MULTILINE), section


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--memory-gib: got none; allowed on a CPU"),
        (["--memory-gib", "0"], "--memory-gib: got 0.0; allowed: above 0"),
        (["--memory-gib", "1", "--frames", "4,x"], "--frames: got '4,x'"),
        (["--memory-gib", "1", "--start", "9", "--most", "8"], "--start: got 9; allowed: 1 to --most"),
        (["--memory-gib", "1", "--tolerance", "2"], "--tolerance: got 2.0; allowed: 0 to 1"),
    ],
)
def test_mistakes_are_one_line(
    experiment: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find-batch-size", "--config", str(experiment), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_failure_that_is_not_memory_ends_the_search(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_size, "TRIAL_MODULE", "no_such_module")
    assert main(["find-batch-size", "--config", str(experiment), "--memory-gib", "1"]) == 2
    assert "the trial failed (crash)" in capsys.readouterr().err


def test_nothing_fits_is_an_answer(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, batch_size: int, **__: object) -> Attempt:
        return Attempt(batch_size=batch_size, cause="out_of_memory", message="CUDA out of memory")

    monkeypatch.setattr(batch_size, "try_batch", never)
    output = tmp_path / "found.json"
    assert main(["find-batch-size", "--config", str(experiment), "--memory-gib", "1", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["rows"][0]["batch_size"] == 0
    assert str(output) in capsys.readouterr().out
