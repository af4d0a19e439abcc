"""Action recognition on the demo's rendered motions, by a trained head."""

from __future__ import annotations

from pathlib import Path

import pytest

import render_demo
from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping
from frozen_fast.training.run import train
from support.action_runs import mapping
from support.datasets import write_manifest
from support.runs import read_json, without_reports

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def motions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's clips with the motion as class: "a red circle falls" is of class "falls"."""
    folder = tmp_path_factory.mktemp("motions")
    render_demo.render_set(folder, render_demo.Recipe(train_pairs=90, test_pairs=30, stills=1), processes=1)
    files = {}
    for name, file in (("train", "train_videos.jsonl"), ("test", "test.jsonl")):
        rows = read_json_lines(folder / file)
        for row in rows:
            row["label"] = row["captions"][0].split(" ", 3)[3]
        files[name] = write_manifest(folder / f"labelled_{name}.jsonl", rows)
    return files


def test_motions_are_classified_after_training(motions: dict[str, Path], tmp_path: Path) -> None:
    """Ten classes, five motions and their reverses: one frame finds at most one of the two, on average."""
    tree = mapping(motions, tmp_path / "run")
    tree["model"]["video"]["size"] = "nano_patch16_64"
    tree["data"]["augmentation"].update(crop_scale=[0.8, 1.0], crop_ratio=[0.95, 1.05])
    stages = [{"frames": 1, "global_batch_size": 32, "steps": 20}, {"frames": 4, "global_batch_size": 32, "steps": 130}]
    tree["curriculum"] = {"stages": stages}
    tree["optimizer"].update(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    tree["evaluation"]["every"] = "stage"
    with without_reports():
        assert train(config_from_mapping(tree)) == 0
    rows = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    one_frame, four_frames = (row["finetuned"] for row in rows)
    assert len(four_frames["classes"]) == 10 and "falls" in four_frames["classes"] and four_frames["clips"] == 60
    assert one_frame["top1"] < 60.0 and four_frames["top1"] > 90.0
