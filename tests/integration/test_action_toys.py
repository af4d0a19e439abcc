"""Action recognition where one frame gives chance: rendered motions, and 734 classes of which few have many clips.

Both by class names alone (zero-shot) and by a trained head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import render_demo
from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping
from frozen_fast.training.run import train
from support.action_runs import mapping
from support.datasets import write_manifest
from support.runs import read_json, without_reports
from support.towers import make_text_tower

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def rows_of(run: Path, found: str) -> list[dict[str, Any]]:
    """What the evaluations of a run hold under "classification" or "finetuned", in order."""
    return [row[found] for row in read_json(run / "metrics.json")["evaluations"]]


@pytest.fixture(scope="module")
def motions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's clips with the motion as class: "a red circle falls" becomes "something falls", of class "falls"."""
    folder = tmp_path_factory.mktemp("motions")
    render_demo.render_set(folder, render_demo.Recipe(train_pairs=90, test_pairs=30, stills=1), processes=1)
    files = {"tower": make_text_tower(folder / "tower", width=64)}
    for name, file in (("train", "train_videos.jsonl"), ("test", "test.jsonl")):
        rows = read_json_lines(folder / file)
        for row in rows:
            row["label"] = row["captions"][0].split(" ", 3)[3]
            row["captions"] = [f"something {row['label']}"]
        files[name] = write_manifest(folder / f"labelled_{name}.jsonl", rows)
    return files


def motion_tree(motions: dict[str, Path], run: Path) -> dict[str, Any]:
    """20 steps of one frame, then 130 of four; evaluated after each stage."""
    tree = mapping(motions, run)
    tree["model"]["video"]["size"] = "nano_patch16_64"
    tree["data"]["augmentation"].update(crop_scale=[0.8, 1.0], crop_ratio=[0.95, 1.05])
    stages = [{"frames": 1, "global_batch_size": 32, "steps": 20}, {"frames": 4, "global_batch_size": 32, "steps": 130}]
    tree["curriculum"] = {"stages": stages}
    tree["optimizer"].update(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    tree["evaluation"]["every"] = "stage"
    return tree


def check_motions(one_frame: dict[str, Any], four_frames: dict[str, Any]) -> None:
    """Ten classes, five motions and their reverses: one frame finds at most one of the two, on average."""
    assert len(four_frames["classes"]) == 10 and "falls" in four_frames["classes"] and four_frames["clips"] == 60
    assert one_frame["top1"] < 60.0 and four_frames["top1"] > 90.0


def test_motions_are_classified_after_training(motions: dict[str, Path], tmp_path: Path) -> None:
    with without_reports():
        assert train(config_from_mapping(motion_tree(motions, tmp_path / "run"))) == 0
    check_motions(*rows_of(tmp_path / "run", "finetuned"))
