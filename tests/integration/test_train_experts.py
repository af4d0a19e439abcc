"""Training on expert features: a planted correspondence is learned, resume is exact, two processes equal one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import frozen_fast
from frozen_fast.cli.main import main
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.data.features.convert_features import convert_features
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.run import evaluate_checkpoint, train
from support.expert_features import planted_features, write_released_layout
from support.runs import REPOSITORY, environment, free_ports, launch, losses, read_json, torchrun

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXPERTS = {"scene.densenet161.0": (24, False), "face": (20, False), "ocr": (12, True)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """330 videos of three captions, 300 to train on; an expert may be missing, its set may have any length."""
    folder = tmp_path_factory.mktemp("features")
    videos = [f"video{number}" for number in range(330)]
    features, texts, words = planted_features(videos, EXPERTS, text_width=18, noise=0.05, hidden=8)
    splits = {"train_list_full": videos[:300], "val_list_full": videos[300:]}
    root = write_released_layout(folder / "released", features, {"openai": texts}, words, splits)
    convert_features(root, folder / "store", list(EXPERTS), ["openai"])
    return folder / "store"


def experiment(store: Path, run_folder: Path, kind: str = "collaborative_experts", **sections: Any) -> dict[str, Any]:
    """A small model of the kind, trained as the released ones are: Ranger, max margin, a factor per epoch."""
    mapping: dict[str, Any] = {
        "name": kind,
        "run_folder": str(run_folder),
        "model": {
            "kind": kind,
            "experts": {
                "experts": [
                    {"name": "ocr", "width": 12, "clusters": 2, "max_vectors": 5},
                    {"name": "face", "width": 20},
                    {"name": "scene.densenet161.0", "width": 24},
                ],
                "width": 32,
                "text_width": 18,
                "text_clusters": 3,
                "max_text_tokens": 8,
            },
        },
        "data": {"sources": [{"name": "train", "format": "features", "path": str(store), "split": "train_list_full"}]},
        "curriculum": {"stages": [{"global_batch_size": 50, "share": 1.0}], "budget_epochs": 40},
        "optimizer": {
            "name": "ranger",
            "learning_rate": 0.02,
            "betas": [0.95, 0.999],
            "eps": 1e-5,
            "weight_decay": 1e-4,
            "decay_all": True,
            "schedule": "epoch_decay",
        },
        "loss": {"name": "max_margin", "margin": 0.2},
        "training": {"device": "cpu", "precision": "fp32"},
        "checkpoints": {"every_steps": 0},
        "evaluation": {
            "every": "end",
            "keep_best": "t2v/Geom",
            "gallery": 10,
            "sources": [{"name": "val", "format": "features", "path": str(store), "split": "val_list_full"}],
        },
    }
    for name, section in sections.items():
        mapping[name] = {**mapping.get(name, {}), **section}
    return mapping


@pytest.mark.parametrize("kind", ["collaborative_experts", "moee"])
def test_a_planted_correspondence_is_learned(kind: str, store: Path, tmp_path: Path) -> None:
    config = config_from_mapping(experiment(store, tmp_path / "run", kind))
    assert train(config) == 0
    rows = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    assert rows[0]["protocol"] == "several_captions" and rows[0]["num_queries"] == 90
    assert rows[0]["metrics"]["t2v/R@1"] > 90 and rows[0]["metrics"]["v2t/R@1"] > 90
    best = RunFolder(tmp_path / "run").checkpoints / "best"
    assert frozen_fast.load_model(best).kind == kind
    again = evaluate_checkpoint(config, str(best))["evaluations"][0]["metrics"]
    assert again == rows[0]["metrics"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert "mixture weights" in (tmp_path / "run" / "gallery_val.html").read_text(encoding="utf-8")
    assert '<a href="gallery_val.html">' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    beside = evaluate_checkpoint(config, str(best), str(tmp_path / "evaluation" / "numbers.json"))
    assert beside["galleries"] == [str(tmp_path / "evaluation" / "gallery_val.html")]
    assert "mixture weights" in Path(beside["galleries"][0]).read_text(encoding="utf-8")


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_resume_is_exact(store: Path, tmp_path: Path) -> None:
    stages = {"stages": [{"global_batch_size": 30, "steps": 10}], "budget_epochs": None}
    changes = {"curriculum": stages, "checkpoints": {"every_steps": 7, "keep": 5}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config_from_mapping(experiment(store, whole, **changes))) == 0
    config = config_from_mapping(experiment(store, cut, **changes))
    assert train(config) == 0
    assert train(config, resume=str(cut / "checkpoints" / "step_00000010")) == 0
    shutil.rmtree(cut / "checkpoints" / "step_00000010")
    assert train(config, resume="auto") == 0
    first, second = weights(whole, 10), weights(cut, 10)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_equal_one(store: Path, tmp_path: Path) -> None:
    stages = {"stages": [{"global_batch_size": 30, "steps": 8}], "budget_epochs": None}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(config_from_mapping(experiment(store, one, curriculum=stages))) == 0
    jobs = tmp_path / "jobs.json"
    (port,) = free_ports(1)
    jobs.write_text(json.dumps([{"kind": "train", "config": experiment(store, two, curriculum=stages), "port": port}]))
    worker = REPOSITORY / "tests" / "support" / "train_worker.py"
    command = torchrun(str(worker), str(jobs))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name, value in weights(one, 8).items():
        assert (weights(two, 8)[name] - value).abs().max() < 1e-3, name
    metrics = [read_json(folder / "metrics.json")["evaluations"][0]["metrics"] for folder in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["cpu_2_zero2", "cpu_2_fsdp2"])
def test_sharded_training_equals_one_process(strategy: str, precision: str, store: Path, tmp_path: Path) -> None:
    """Batch norm over all ranks, Ranger's slow weights and the mixture under sharding; seven steps hold a slow one."""
    if "zero" in strategy:
        pytest.importorskip("deepspeed")
    sections = {
        "curriculum": {"stages": [{"global_batch_size": 30, "steps": 7}], "budget_epochs": None},
        "training": {"device": "cpu", "precision": precision},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(config_from_mapping(experiment(store, one, **sections))) == 0
    config = tmp_path / "two.yaml"
    config.write_text(dump_yaml(config_from_mapping(experiment(store, two, **sections))), encoding="utf-8")
    done = launch(strategy, REPOSITORY / "train.py", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    loss_tolerance, weight_tolerance = (1e-4, 1e-3) if precision == "fp32" else (0.03, 0.05)
    assert losses(two) == pytest.approx(losses(one), rel=loss_tolerance)
    found = weights(two, 7)
    for name, value in weights(one, 7).items():
        assert (found[name] - value).abs().max() < weight_tolerance, name


def test_seeds_are_run_one_after_the_other_and_averaged(store: Path, tmp_path: Path, capfd) -> None:
    mapping = experiment(store, tmp_path / "run", paper={"table": "Collaborative Experts", "row": "MSVD"})
    mapping["curriculum"] = {"stages": [{"global_batch_size": 50, "steps": 4}]}
    (tmp_path / "experiment.yaml").write_text(dump_yaml(config_from_mapping(mapping)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", environment())
        assert main(["train", "--config", str(tmp_path / "experiment.yaml"), "--seeds", "1,4"]) == 0
    (row, *_) = json.loads((tmp_path / "run" / "seeds.json").read_text(encoding="utf-8"))
    values = [
        read_json(tmp_path / "run" / f"seed_{seed}" / "metrics.json")["evaluations"][0]["metrics"]["t2v/MnR"]
        for seed in (1, 4)
    ]
    assert values[0] != values[1] and row["seeds"] == [1, 4]
    assert row["mean"]["t2v/MnR"] == pytest.approx(sum(values) / 2)
    assert row["deviation"]["t2v/MnR"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    written = (tmp_path / "run" / "seeds.md").read_text(encoding="utf-8")
    assert "Collaborative Experts, MSVD" in written and (tmp_path / "run" / "seeds.html").is_file()
    assert main(["train", "--config", str(tmp_path / "experiment.yaml"), "--seeds", "1,1"]) == 2
    assert "--seeds: got '1,1'; allowed: distinct whole numbers" in capfd.readouterr().err
