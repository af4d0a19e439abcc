"""Training CLIP2Video from a config: start from CLIP, masks of short clips, 6 => 12 frames, resume, ranks, sharding."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import frozen_fast
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_SIZES, CLIP_STD, Clip
from frozen_fast.models.clip2video.clip2video_model import Clip2Video
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.training.run import evaluate_checkpoint, train
from support.runs import REPOSITORY, environment, losses, make_data, read_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = (5, 5)
STRATEGIES = {"ddp": "cpu_2", "zero2": "cpu_2_zero2", "zero3": "cpu_2_zero3", "fsdp2": "cpu_2_fsdp2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips of 12 frames at 10 per second (six at 5 per second: short ones, with masks), and a tiny CLIP's weights."""
    pytest.importorskip("open_clip", reason="needs the extra clip")
    folder = tmp_path_factory.mktemp("clip2video")
    torch.manual_seed(0)
    torch.save(Clip(CLIP_SIZES["tiny"]).state_dict(), folder / "ViT-tiny.pt")
    return {**make_data(folder, videos=16), "clip": folder / "ViT-tiny.pt"}


def experiment(files: dict[str, Path], run_folder: Path, **sections: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "name": "clip2video",
        "run_folder": str(run_folder),
        "model": {"kind": "clip2video", "clip2video": {"clip": str(files["clip"])}, "video": {"attention": "sdpa"}},
        "data": {
            "sources": [{"name": "videos", "path": str(files["videos"])}],
            "sampling": {"rule": "fixed_rate", "frames_per_second": 7.0},
            "augmentation": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
            "decode": {"backend": "pyav", "threads": 1},
        },
        "curriculum": {
            "stages": [
                {"frames": 6, "global_batch_size": 4, "steps": STEPS[0]},
                {"frames": 12, "global_batch_size": 4, "steps": STEPS[1]},
            ]
        },
        "optimizer": {
            "learning_rate": 1e-4,
            "betas": [0.9, 0.98],
            "weight_decay": 0.2,
            "gradient_clip_norm": 1.0,
            "schedule": "cosine",
            "groups": [{"match": "clip.*", "learning_rate_scale": 0.1}],
        },
        "loss": {"temperature": 1.0, "average_directions": True},
        "training": {"precision": "fp32", "device": "cpu"},
        "checkpoints": {"every_steps": 4, "keep": 10},
        "evaluation": {
            "every": "end",
            "sources": [{"name": "held_out", "path": str(files["videos"])}],
            "batch_size": 5,
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return tree


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train(config_from_mapping(experiment(files, folder))) == 0
    return folder


def test_the_run_starts_from_clip_and_learns_every_part(files: dict[str, Path], alone: Path) -> None:
    model = frozen_fast.load_model(alone / "checkpoints" / "step_00000010")
    assert isinstance(model, Clip2Video) and model.tokenizer is not None
    torch.manual_seed(0)
    start = Clip(CLIP_SIZES["tiny"]).state_dict()
    moved = {name: (value - start[name]).abs().max() for name, value in model.clip.state_dict().items()}
    never_read = {"positional_embedding", "token_embedding.weight"}  # rows of tokens that no caption has stay
    assert all(0 < value < 1e-2 for name, value in moved.items() if name not in never_read)
    frames = model.frame_position_embeddings.weight
    assert ((frames[:8] - start["positional_embedding"][:8]).abs().amax(dim=1) > 1e-5).all(), "8 frames at 7 per second"
    rows = read_json(alone / "metrics.json")["evaluations"]
    assert rows[0]["frames"] == 12 and 0 <= rows[0]["metrics"]["t2v/R@1"] <= 100
    assert (alone / "report.html").is_file()


def test_the_loss_falls(files: dict[str, Path], tmp_path: Path) -> None:
    """Eight clips without augmentation are learned by heart."""
    stages = {"stages": [{"frames": 6, "global_batch_size": 8, "steps": 60}]}
    changes = {"curriculum": stages, "checkpoints": {"every_steps": 0}, "evaluation": {"every": "never"}}
    fast = {"learning_rate": 1e-3, "groups": [], "weight_decay": 0.0, "schedule": "constant"}
    tree = experiment(files, tmp_path / "run", **changes, optimizer=fast)
    tree["data"]["sources"][0]["max_clips"] = 8
    tree["data"]["augmentation"].update(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], horizontal_flip=0.0)
    assert train(config_from_mapping(tree)) == 0
    values = losses(tmp_path / "run")
    assert sum(values[-4:]) / 4 < 0.5 * sum(values[:4]) / 4


def test_resume_is_exact(files: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    config = config_from_mapping(experiment(files, folder))
    assert train(config) == 0
    for name in ("step_00000010", "step_00000008"):
        shutil.rmtree(folder / "checkpoints" / name)
    assert train(config, resume="auto") == 0
    first, second = weights(alone, 10), weights(folder, 10)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_does(strategy: str, files: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    """Features of both ranks are gathered, so that the loss and its gradients are those of the whole batch."""
    config = tmp_path / "config.yaml"
    folder = tmp_path / strategy
    config.write_text(dump_yaml(config_from_mapping(experiment(files, folder))), encoding="utf-8")
    settings = REPOSITORY / "configs" / "accelerate" / f"{STRATEGIES[strategy]}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command += [str(REPOSITORY / "train.py"), "--config", str(config)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder) == pytest.approx(losses(alone), rel=2e-4)
    for name, value in weights(alone, 10).items():
        assert (weights(folder, 10)[name] - value).abs().max() < 2e-4, name
    metrics = [read_json(run / "metrics.json")["evaluations"][0]["metrics"] for run in (alone, folder)]
    assert metrics[0] == pytest.approx(metrics[1], rel=0.05)


def test_bf16_autocast_over_fp32_weights(files: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    """Losses near those of fp32; weights and the optimizer's moments stay fp32."""
    folder = tmp_path / "bf16"
    assert train(config_from_mapping(experiment(files, folder, training={"precision": "bf16"}))) == 0
    assert losses(folder) == pytest.approx(losses(alone), rel=0.05)
    assert {value.dtype for value in weights(folder, 10).values()} == {torch.float32}
    _, state = read_tensors(folder / "checkpoints" / "step_00000010")
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}


def test_the_run_folder_has_flops_and_kernels(alone: Path) -> None:
    rows = read_json(alone / "stages.json")
    assert [row["frames"] for row in rows] == [6, 12]
    assert all(row["flops_per_clip"] > 0 for row in rows) and rows[1]["flops_per_clip"] > rows[0]["flops_per_clip"]
    kernels = read_json(alone / "environment.json")
    assert kernels["attention_backends"][0]["backend"] == "sdpa" and kernels["fused_ops"] in ("cpu_c", "plain")


def test_evaluation_of_a_released_file(files: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    """A state dict as upstream writes it gives the metrics of the checkpoint that it came from."""
    path = tmp_path / "pytorch_model.bin.2"
    torch.save(weights(alone, 10), path)
    tree = experiment(files, tmp_path / "run", evaluation={"frames": 12})
    config = config_from_mapping(tree)
    rows = evaluate_checkpoint(config, str(path))["evaluations"]
    assert rows[0]["metrics"] == read_json(alone / "metrics.json")["evaluations"][0]["metrics"]
