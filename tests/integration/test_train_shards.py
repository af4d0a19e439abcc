"""From videos to shards to a trained and evaluated model, by the commands that a user types."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from frozen_fast.cli import main
from support.runs import losses, make_data, read_json, tiny_mapping

pytestmark = pytest.mark.integration


def test_pack_then_train_and_evaluate_from_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_data(tmp_path, videos=12, pictures=1)
    experiment = tmp_path / "videos.yaml"
    experiment.write_text(yaml.safe_dump(tiny_mapping(files, tmp_path / "run")))
    shards = tmp_path / "shards"
    assert main(["pack", "--config", str(experiment), "--output", str(shards), "--workers", "0"]) == 0
    assert "12 clips, 96 frames" in capsys.readouterr().out
    for file in (tmp_path / "videos" / "clips").iterdir():
        file.unlink()

    source = {"name": "videos", "format": "shards", "path": str(shards)}
    mapping = tiny_mapping(
        files, tmp_path / "run", data={"sources": [source]}, evaluation={"every": "end", "sources": [source]}
    )
    experiment.write_text(yaml.safe_dump(mapping))
    assert main(["train", "--config", str(experiment)]) == 0
    values = losses(tmp_path / "run")
    assert len(values) == 8 and all(math.isfinite(value) for value in values)
    (evaluation,) = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    assert evaluation["num_videos"] == 12 and evaluation["frames"] == 4
    environment = read_json(tmp_path / "run" / "environment.json")
    assert "jpeg" in str(environment["decode_backends"])
    assert "jpeg" in (tmp_path / "run" / "report.md").read_text(), "the report says who read the clips"
