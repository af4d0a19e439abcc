"""The average of the weights: its formula, evaluation with it, its model in checkpoints, exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from frozen_fast import DualEncoder
from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.optimizers import WEIGHT_AVERAGE, build_optimizer
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.training.run import evaluate_checkpoint, train
from support.runs import losses, make_data, read_json, tiny_config, without_reports

DECAY = 0.7


def test_the_average_follows_its_formula_and_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    kept = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_average_decay=DECAY))
    plain = build_optimizer(twin, OptimizerConfig(learning_rate=0.1))
    expected: torch.Tensor | None = None
    for _ in range(5):
        x = torch.randn(4, 3)
        for one, optimizer in ((model, kept), (twin, plain)):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
        weight = model.weight.detach().clone()
        expected = weight if expected is None else DECAY * expected + (1 - DECAY) * weight
    assert torch.equal(model.weight, twin.weight)
    torch.testing.assert_close(kept.state[model.weight][WEIGHT_AVERAGE], expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"), videos=12, pictures=4)


def config_of(data: dict[str, Path], folder: Path, decay: float = DECAY) -> Any:
    return tiny_config(
        data,
        folder,
        optimizer={"learning_rate": 1e-3, "weight_average_decay": decay},
        evaluation={"every": "stage", "sources": [{"name": "own", "path": str(data["videos"])}]},
        checkpoints={"every_steps": 3, "keep": 10},
    )


def test_runs_evaluate_keep_and_resume_the_average(data: dict[str, Path], tmp_path: Path) -> None:
    with without_reports():
        assert train(config_of(data, tmp_path / "whole")) == 0
        assert train(config_of(data, tmp_path / "plain", decay=0.0)) == 0
        assert train(config_of(data, tmp_path / "resumed")) == 0
        folder = tmp_path / "resumed"
        for name in ("step_00000004", "step_00000006", "step_00000008"):
            shutil.rmtree(folder / "checkpoints" / name)
        assert train(config_of(data, folder), resume="auto") == 0
    steps = [losses(tmp_path / name) for name in ("whole", "plain", "resumed")]
    assert steps[0] == steps[1] == steps[2], "the average changes nothing in training, and resuming is exact"
    last = tmp_path / "whole" / "checkpoints" / "step_00000008"
    again = tmp_path / "resumed" / "checkpoints" / "step_00000008"
    average = DualEncoder.from_pretrained(last / "averaged")
    model = DualEncoder.from_pretrained(last)
    assert average.learned_frames == model.learned_frames == 4
    other = DualEncoder.from_pretrained(again / "averaged").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in average.state_dict().items())
    assert not torch.equal(average.vid_proj[0].weight, model.vid_proj[0].weight)
    state = read_tensors(last)[1]
    assert torch.equal(state["vid_proj.0.weight"][WEIGHT_AVERAGE], average.vid_proj[0].weight)
    row = read_json(tmp_path / "whole" / "metrics.json")["evaluations"][-1]
    plain = read_json(tmp_path / "plain" / "metrics.json")["evaluations"][-1]
    (found,) = evaluate_checkpoint(config_of(data, tmp_path / "unused"), str(last / "averaged"))["evaluations"]
    assert row["loss"] == pytest.approx(found["loss"], rel=1e-5) and row["loss"] != plain["loss"]
