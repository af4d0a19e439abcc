"""Every strategy trains as one process does: through accelerate launch, a kill, a resume, a stage change and export.

Two launches per strategy with the shipped CPU files, two processes each: the first is killed after step 9 (last
checkpoint: step 8), the second resumes, goes from 1 to 4 frames after step 10, and ends after step 20 with an
evaluation in which one rank has more windows than the other.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast import DualEncoder
from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig, config_from_mapping, dump_yaml
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.training.run import train
from support.runs import REPOSITORY, environment, launch, losses, make_data, read_json, tiny_mapping

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STRATEGIES = {
    "ddp": "cpu_2",
    "zero1": "cpu_2_zero1",
    "zero2": "cpu_2_zero2",
    "zero3": "cpu_2_zero3",
    "fsdp2": "cpu_2_fsdp2",
}
KILLED, SAVED, LAST = 9, 8, 20
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """21 clips: 11 for one rank and 10 for the other, three batches of five against two."""
    return make_data(tmp_path_factory.mktemp("data"), videos=21)


def mapping(data: dict[str, Path], folder: Path, **sections: Any) -> dict[str, Any]:
    """Two sources, two passes a step, clipping, weight decay, its own learning rate for the text tower."""
    tree = {
        "data": {
            "sources": [
                {"name": "videos", "path": str(data["videos"])},
                {"name": "pictures", "path": str(data["pictures"])},
            ],
            "decode": {"backend": "pyav", "threads": 1},
        },
        "curriculum": {
            "stages": [
                {"frames": 1, "global_batch_size": 6, "steps": 10},
                {"frames": 4, "global_batch_size": 4, "steps": 10},
            ],
            "gradient_accumulation_steps": 2,
        },
        "model": {
            "video": {"size": "pico_patch16_32", "attention": "sdpa"},
            "text": {"name": str(data["tower"]), "max_tokens": 12},
            "embedding_width": 16,
            "expansion": "nearest",
        },
        "optimizer": {
            "learning_rate": 1e-4,
            "gradient_clip_norm": 1.0,
            "weight_decay": 0.1,
            "text_learning_rate_scale": 0.5,
        },
        "loss": {"temperature": 0.02},  # keeps the losses of so few clips away from that of guessing
        "checkpoints": {"every_steps": SAVED, "keep": 10, "asynchronous": False},  # a kill follows
        "evaluation": {
            "every": "end",
            "sources": [{"name": "held_out", "path": str(data["videos"])}],
            "batch_size": 5,
            "stride_seconds": 0.0,
        },
    }
    return tiny_mapping(data, folder, **{**tree, **sections})


def experiment(data: dict[str, Path], folder: Path, **sections: Any) -> ExperimentConfig:
    return config_from_mapping(mapping(data, folder, **sections))


def write_config(config: ExperimentConfig, path: Path) -> str:
    path.write_text(dump_yaml(config), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def alone(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(experiment(data, folder)) == 0
    return folder


@pytest.fixture(scope="module", params=STRATEGIES)
def finished(
    request: pytest.FixtureRequest, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(strategy, run folder) of a run that was killed and resumed."""
    strategy: str = request.param
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    parent = tmp_path_factory.mktemp(strategy)
    folder = parent / "run"
    config = write_config(experiment(data, folder), parent / "config.yaml")
    worker = REPOSITORY / "tests" / "support" / "strategy_worker.py"
    first = launch(STRATEGIES[strategy], worker, str(KILLED), "--config", config)
    assert first.returncode != 0
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"step_{SAVED:08d}"], first.stderr[-3000:]
    assert read_json(folder / "status.json")["state"] == "running"
    second = launch(STRATEGIES[strategy], REPOSITORY / "train.py", "--config", config, "--resume", "auto")
    assert second.returncode == 0, second.stderr[-3000:]
    return strategy, folder


def losses_by_step(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_json_lines(folder / "steps.jsonl")}


def checkpoint(folder: Path, step: int = LAST) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def test_losses_are_those_of_one_process(finished: tuple[str, Path], alone: Path) -> None:
    strategy, folder = finished
    found = losses(folder)
    assert len(found) == LAST
    assert found == pytest.approx(losses(alone), abs=TOLERANCE)
    described = read_json(folder / "environment.json")
    assert (described["strategy"], described["world_size"]) == (strategy, 2)
    if strategy.startswith("zero"):
        assert described["distributed_type"] == "DEEPSPEED"


@pytest.mark.parametrize("step", [SAVED, 10, LAST])
def test_checkpoints_hold_whole_weights_and_optimizer_state(finished: tuple[str, Path], alone: Path, step: int) -> None:
    """By name, in fp32, equal to one process's: before and after the resume, and after the stage change."""
    (weights, state), (expected, expected_state) = (read_tensors(checkpoint(run, step)) for run in (finished[1], alone))
    assert list(weights) == list(expected) and state.keys() == expected_state.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=0, msg=name)
    for name, tensors in expected_state.items():
        assert state[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(state[name][key], tensor, atol=1e-5, rtol=1e-3, msg=f"{name} {key}")
        assert float(state[name]["step"]) == step


def test_evaluation_counts_every_clip_once(finished: tuple[str, Path], alone: Path) -> None:
    (row,), (expected,) = (read_json(run / "metrics.json")["evaluations"] for run in (finished[1], alone))
    assert (row["num_videos"], row["windows"]) == (21, 21)
    assert row["metrics"] == pytest.approx(expected["metrics"], abs=100 / 21 + 0.01)  # a tie may fall either way


def test_the_export_is_a_model(finished: tuple[str, Path], alone: Path) -> None:
    model, expected = (DualEncoder.from_pretrained(checkpoint(run)) for run in (finished[1], alone))
    assert model.learned_frames == 4
    video = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(video), expected.encode_video(video), atol=1e-3, rtol=0)


def test_one_process_resumes_any_strategys_checkpoint(
    finished: tuple[str, Path], alone: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = experiment(data, tmp_path / "run", evaluation={"every": "never"})
    assert train(config, resume=str(checkpoint(finished[1], SAVED))) == 0
    expected = {step: loss for step, loss in losses_by_step(alone).items() if step > SAVED}
    assert losses_by_step(tmp_path / "run") == pytest.approx(expected, abs=TOLERANCE)


def test_zero3_resumes_a_checkpoint_of_one_process(alone: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """After the stage change, so that weights and state of four frames' rows are cut."""
    pytest.importorskip("deepspeed")
    config = experiment(data, tmp_path / "run")
    path = write_config(config, tmp_path / "config.yaml")
    done = launch("cpu_2_zero3", REPOSITORY / "train.py", "--config", path, "--resume", str(checkpoint(alone, 16)))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {step: loss for step, loss in losses_by_step(alone).items() if step > 16}
    assert losses_by_step(tmp_path / "run") == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone_in_bf16(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps at two frames, under autocast."""
    folder = tmp_path_factory.mktemp("alone_in_bf16") / "run"
    assert train(in_bf16(data, folder)) == 0
    return folder


def in_bf16(data: dict[str, Path], folder: Path) -> ExperimentConfig:
    return experiment(
        data,
        folder,
        training={"precision": "bf16"},
        curriculum={"stages": [{"frames": 2, "global_batch_size": 6, "steps": 2}], "gradient_accumulation_steps": 2},
        checkpoints={"every_steps": 0},
        evaluation={"every": "never"},
    )


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_cut_weights_are_whole_under_bf16_autocast(
    strategy: str, alone_in_bf16: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """Layers under autocast find gathered weights, forward and backward."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    path = write_config(in_bf16(data, tmp_path / "run"), tmp_path / "config.yaml")
    done = launch(STRATEGIES[strategy], REPOSITORY / "train.py", "--config", path)
    assert done.returncode == 0, done.stderr[-3000:]
    # bf16 keeps 8 bits, and a rank multiplies other shapes than one process does
    assert losses(tmp_path / "run") == pytest.approx(losses(alone_in_bf16), rel=2e-2)


def test_a_contradiction_ends_the_launch_with_one_line(data: dict[str, Path], tmp_path: Path) -> None:
    """The launcher's environment says another accumulation than the experiment: exit code 2, nothing written."""
    pytest.importorskip("deepspeed")
    path = write_config(experiment(data, tmp_path / "run"), tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "--config", path],
        env=environment(
            ACCELERATE_USE_DEEPSPEED="true",
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3",
            LOCAL_RANK="0",
            RANK="0",
            WORLD_SIZE="1",
        ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "gradient_accumulation_steps: got 3" in line and "curriculum.gradient_accumulation_steps is 2" in line
    assert not (tmp_path / "run").exists()
