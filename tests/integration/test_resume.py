"""Stopped, crashed and killed runs go on as if nothing had happened: bit for bit on a CPU, across a stage change."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import train
from support.runs import losses, make_data, read_json, tiny_config, without_reports

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With dropout, so that resuming has random draws to get wrong."""
    files = make_data(tmp_path_factory.mktemp("data"))
    config = json.loads((files["tower"] / "config.json").read_text(encoding="utf-8"))
    config.update(dropout=0.3, attention_dropout=0.3)
    (files["tower"] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return files


def experiment(data: dict[str, Path], folder: Path) -> ExperimentConfig:
    return tiny_config(
        data,
        folder,
        data={
            "sources": [
                {"name": "videos", "path": str(data["videos"])},
                {"name": "pictures", "path": str(data["pictures"]), "weight": 0.5},
            ],
            "order": "weighted",
            "decode": {"backend": "pyav", "threads": 1},
        },
        curriculum={
            "stages": [
                {"frames": 1, "global_batch_size": 4, "steps": 5},
                {"frames": 3, "global_batch_size": 4, "steps": 5},
            ]
        },
        model={
            "video": {"size": "pico_patch16_32", "attention": "sdpa"},
            "text": {"name": str(data["tower"]), "max_tokens": 12},
            "embedding_width": 16,
            "expansion": "bilinear",
        },
        optimizer={"warmup_steps": 3, "schedule": "cosine"},
        checkpoints={"every_steps": 3, "keep": 3},
        evaluation={"every": "stage", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )


def run_until(config: ExperimentConfig, step: int, act: Callable[[], None], **arguments: str) -> int:
    """Train, and do something right after a step was recorded."""
    original = Journal.add

    def add(self: Journal, result, meter) -> None:  # type: ignore[no-untyped-def]
        original(self, result, meter)
        if result.step == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add)
        return train(config, **arguments)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise ConnectionError("the machine is gone")


@pytest.fixture(scope="module")
def straight(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train(experiment(data, folder)) == 0
    return folder


def assert_same_run(folder: Path, straight: Path) -> None:
    """Losses, weights, optimizer state and metrics are equal to the last bit."""
    assert losses(folder) == losses(straight)
    weights, optimizer = read_tensors(folder / "checkpoints" / "step_00000010")
    expected_weights, expected_optimizer = read_tensors(straight / "checkpoints" / "step_00000010")
    assert weights.keys() == expected_weights.keys() and optimizer.keys() == expected_optimizer.keys()
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    for name, tensors in expected_optimizer.items():
        assert all(torch.equal(optimizer[name][key], tensor) for key, tensor in tensors.items()), name
    rows, expected = (read_json(run / "metrics.json")["evaluations"] for run in (folder, straight))
    assert [(row["step"], row["metrics"]) for row in rows] == [(row["step"], row["metrics"]) for row in expected]
    for row, other in zip(read_json(folder / "stages.json"), read_json(straight / "stages.json"), strict=True):
        assert [row[key] for key in ("stage", "steps", "clips", "video_frames")] == [
            other[key] for key in ("stage", "steps", "clips", "video_frames")
        ]
    assert read_json(folder / "status.json")["state"] == "done"


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_signal_saves_and_the_rest_is_bit_identical(
    data: dict[str, Path], straight: Path, tmp_path: Path, step: int
) -> None:
    """Told at step 1, 4 (just before the stage's last) or 7 (in the second stage): one more step, then out."""
    config = experiment(data, tmp_path / "run")
    assert run_until(config, step, terminate) == 75
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, step + 1)
    assert len(losses(tmp_path / "run")) == step + 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train(config, resume="auto") == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_crash_between_checkpoints_repeats_no_step(data: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    """Crashed after step 8, last checkpoint at 6: steps 7 and 8 are cut off and done again."""
    config = experiment(data, tmp_path / "run")
    with pytest.raises(ConnectionError):
        run_until(config, 8, crash)
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1) and "machine is gone" in status["message"]
    assert len(losses(tmp_path / "run")) == 8
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step_00000006"
    # Left behind by a kill while writing the next one:
    shutil.copytree(tmp_path / "run/checkpoints/step_00000006", tmp_path / "run/checkpoints/.step_00000009.1.tmp")
    assert train(config, resume="auto") == 0
    assert_same_run(tmp_path / "run", straight)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_crash_before_the_first_checkpoint_begins_anew(data: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    config = experiment(data, tmp_path / "run")
    with pytest.raises(ConnectionError):
        run_until(config, 2, crash)
    assert train(config, resume="auto") == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_kill_before_the_stage_row_evaluates_again_once(
    data: dict[str, Path], straight: Path, tmp_path: Path
) -> None:
    """The stage's checkpoint and evaluation are there, its row is not."""
    shutil.copytree(straight, tmp_path / "run")
    config = load_config(straight / "config.yaml", [f"run_folder={tmp_path / 'run'}"])
    rows = read_json(tmp_path / "run" / "stages.json")
    (tmp_path / "run" / "stages.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    assert train(config, resume="auto") == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_checkpoint_can_be_named_for_another_folder_but_not_behind_the_runs_back(
    data: dict[str, Path], straight: Path, tmp_path: Path
) -> None:
    earlier = straight / "checkpoints" / "step_00000006"
    with pytest.raises(UserError, match="^--resume: got .*step_00000006', but this run has got to step_00000010"):
        train(experiment(data, straight), resume=str(earlier))
    with pytest.raises(UserError, match="^--resume: got 'nowhere'; allowed: none, auto, or a checkpoint folder"):
        train(experiment(data, tmp_path / "run"), resume="nowhere")
    assert train(experiment(data, tmp_path / "run"), resume=str(earlier)) == 0
    weights, _ = read_tensors(tmp_path / "run" / "checkpoints" / "step_00000010")
    expected, _ = read_tensors(straight / "checkpoints" / "step_00000010")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_other_clips_are_noticed(data: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    """Moved data may go on; a collection with other clips may not."""
    moved = tmp_path / "videos"
    shutil.copytree(data["videos"].parent, moved)
    shutil.copytree(straight, tmp_path / "run")
    overrides = [f"run_folder={tmp_path / 'run'}", f"data.sources[0].path={moved / 'manifest.jsonl'}"]
    assert train(load_config(straight / "config.yaml", overrides), resume="auto") == 0
    lines = (moved / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    (moved / "manifest.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="^data.sources: source 'videos' holds 24 clips, .* started with 24 clips"):
        train(load_config(straight / "config.yaml", overrides), resume="auto")
