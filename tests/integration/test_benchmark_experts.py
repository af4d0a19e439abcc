"""benchmarks/expert_step.py at a tiny size: the plain form computes what it is compared with."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import expert_step
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.config.schema import LossConfig
from frozen_fast.losses import batch_loss, build_loss
from frozen_fast.optimizers.ranger import Ranger
from support.runs import read_json

EXPERTS = {
    "kind": "collaborative_experts",
    "experts": {
        "experts": [
            {"name": "audio", "width": 5, "clusters": 2, "max_vectors": 4},
            {"name": "face", "width": 6},
            {"name": "scene", "width": 7},
        ],
        "width": 16,
        "text": "words",
        "text_width": 9,
        "text_clusters": 3,
        "max_text_tokens": 8,
    },
}


def experiment(folder: Path) -> Path:
    mapping = {
        "model": EXPERTS,
        "data": {"sources": [{"name": "train", "format": "features", "path": "nowhere"}]},
        "curriculum": {"stages": [{"global_batch_size": 8, "steps": 1}]},
        "optimizer": {"name": "ranger", "learning_rate": 0.01, "betas": [0.95, 0.999], "eps": 1e-5, "decay_all": True},
        "loss": {"name": "max_margin", "margin": 0.2},
        "training": {"device": "cpu", "precision": "fp32"},
    }
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(config_from_mapping(mapping)), encoding="utf-8")
    return path


def test_the_plain_optimizer_and_loss_are_those_of_training(tmp_path: Path) -> None:
    from frozen_fast.config import load_config

    torch.manual_seed(0)
    start = torch.randn(5, 4)
    own, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    config = load_config(experiment(tmp_path))
    ours = Ranger([own], lr=0.01, betas=(0.95, 0.999), eps=1e-5, weight_decay=config.optimizer.weight_decay)
    theirs = expert_step.PlainRanger(iter([plain]), config)
    for _ in range(13):
        gradient = torch.randn(5, 4)
        own.grad, plain.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    sim = torch.randn(6, 6)
    expected = batch_loss(build_loss(LossConfig(name="max_margin", margin=0.2)), sim[None], {})
    assert float(expert_step.max_margin(sim, 0.2)) == pytest.approx(float(expected))


@pytest.mark.slow
def test_both_forms_agree_and_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.json"
    words = ["--rounds", "1", "--videos", "16", "--config", str(experiment(tmp_path)), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["expert_step.py", *words])
    expert_step.main()
    result = read_json(output)
    assert result["largest_difference"] < 1e-5 and result["steps"] == 6
    for name in ("plain", "frozen_fast"):
        parts = result[name]
        assert parts["step_seconds"]["median"] > 0 and math.isfinite(parts["epoch_seconds"])
        assert parts["epoch_seconds"] == pytest.approx(parts["mean_step_seconds"] * 6513 / 8)
    assert result["ratio"] == pytest.approx(
        result["plain"]["mean_step_seconds"] / result["frozen_fast"]["mean_step_seconds"]
    )
