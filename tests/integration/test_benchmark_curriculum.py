"""benchmarks/curriculum.py at a tiny size: five rows, resumed, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import curriculum
from frozen_fast.errors import UserError
from support.runs import REPOSITORY, environment, make_data

CLIPS = 32


def test_every_row_gets_the_papers_shares() -> None:
    sizes = curriculum.parse_batch_sizes("1=48,4=32,8=32")
    assert [stage["share"] for stage in curriculum.stages_of("1=>4=>8", sizes)] == [0.644, 0.178, 0.178]
    for row in curriculum.ROW_CONFIGS:
        stages = curriculum.stages_of(row, sizes)
        assert "=>".join(str(stage["frames"]) for stage in stages) == row
        assert sum(stage["share"] for stage in stages) == pytest.approx(1.0)
    with pytest.raises(UserError, match="--batch-sizes: got none for 8 frames"):
        curriculum.stages_of("8", {1: 4})
    with pytest.raises(UserError, match="--batch-sizes: got '1=x'"):
        curriculum.parse_batch_sizes("1=x")


def entry(row: str, seed: int, hours: float, recall: float) -> dict:
    return {"row": row, "seed": seed, "hours": hours, "clips": 100, "queries": 10, "metrics": {"t2v/R@1": recall}}


def test_the_finding_is_computed_from_the_runs() -> None:
    runs = [
        entry("8", 0, 2.0, 50.0),
        entry("8", 1, 4.0, 40.0),
        entry("1=>4=>8", 0, 1.0, 53.0),
        entry("1=>4=>8", 1, 1.0, 41.0),
    ]
    told = curriculum.finding(runs)
    # Shares 0.5 and 0.25; differences 3 and 1: mean 2, standard deviation sqrt(2), over sqrt(2) seeds.
    assert "takes 0.38 of the hours of 8 throughout (paper: 0.37)" in told
    assert "R@1: +2.0 points (standard error 1.0)" in told
    rows = curriculum.summary(runs)
    assert [row["row"] for row in rows] == ["8", "1=>4=>8"]
    assert rows[0]["hours"] == pytest.approx((3.0, 2**0.5)) and rows[1]["metrics"]["t2v/R@1"][0] == 47.0
    assert "nothing to compare" in curriculum.finding(runs[:2])


@pytest.mark.slow
def test_trains_every_row_once_and_continues(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", videos=8, pictures=1)
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/curriculum.py"),
        "--train",
        str(data["videos"]),
        "--test",
        str(data["videos"]),
        "--clips",
        str(CLIPS),
        "--seeds",
        "0",
        "--batch-sizes",
        "1=4,4=4,8=4",
        "--rows",
        "8",
        "1=>4=>8",
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
        "model.video.size=pico_patch16_32",
        f"model.text.name={data['tower']}",
        "model.text.frozen_layers=0",
        "model.text.weights=random",
        "model.text.max_tokens=12",
        "data.decode.backend=pyav",
        "training.device=cpu",
        "evaluation.resize=36",
        "model.embedding_width=16",
        "optimizer.warmup_steps=2",
    ]
    first = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "out/curriculum.json").read_text())
    assert [entry["row"] for entry in result["runs"]] == ["8", "1=>4=>8"]
    assert result["runs"][0]["clips"] == CLIPS
    assert abs(result["runs"][1]["clips"] - CLIPS) <= 4 * 3, "an equal budget, to within a batch of each stage"
    assert {entry["frames"] for entry in result["runs"]} == {8}
    assert "=> 4 => 8" in (tmp_path / "out/curriculum.md").read_text()
    assert (tmp_path / "out/curriculum.svg").read_text().lstrip().startswith("<?xml")
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and again.stdout.count("done already") == 2
