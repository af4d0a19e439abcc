"""Whole runs with each loss, a learned temperature and frozen parts: the loss falls, resuming is exact, models load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import frozen_fast
from frozen_fast.training.run import train
from support.runs import losses, make_data, tiny_config, without_reports

pytestmark = pytest.mark.integration

CASES: dict[str, dict[str, Any]] = {
    "learned temperature": {"loss": {"learnable_temperature": True, "average_directions": True}},
    "sigmoid": {"loss": {"name": "sigmoid", "learnable_temperature": True, "temperature": 0.1}},
    "max margin": {"loss": {"name": "max_margin", "margin": 0.05}, "optimizer": {"learning_rate": 1e-3}},
    "frozen video tower": {"optimizer": {"groups": [{"match": "video_model.*", "frozen": True}]}},
    "lion": {"optimizer": {"name": "lion", "learning_rate": 3e-4}},
    "lamb": {"optimizer": {"name": "lamb", "learning_rate": 1e-2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"), videos=8, pictures=1)


def config_of(data: dict[str, Path], folder: Path, case: dict[str, Any]) -> Any:
    return tiny_config(
        data,
        folder,
        **{"loss": case.get("loss", {})},
        optimizer={"learning_rate": 3e-3, **case.get("optimizer", {})},
        curriculum={"stages": [{"frames": frames, "global_batch_size": 8, "steps": 24} for frames in (1, 2)]},
        checkpoints={"every_steps": 8, "keep": 10},
    )


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_resuming_is_exact_and_the_checkpoint_loads(
    name: str, data: dict[str, Path], tmp_path: Path
) -> None:
    with without_reports():
        config = config_of(data, tmp_path / "run", CASES[name])
        assert train(config) == 0
        values = losses(tmp_path / "run")
        assert sum(values[-4:]) < 0.98 * sum(values[:4]), values
        last = tmp_path / "run" / "checkpoints" / "step_00000048"
        whole = frozen_fast.load_model(last).state_dict()
        for step in (48, 40, 32, 24):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        assert train(config, resume="auto") == 0
    assert losses(tmp_path / "run") == values
    again = frozen_fast.load_model(last)
    assert whole.keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.items())
    learns = bool(CASES[name].get("loss", {}).get("learnable_temperature"))
    assert (again.loss_scale is not None) == learns
    if learns:
        assert float(again.loss_scale.logit_scale) != pytest.approx(
            2.302585 if name == "sigmoid" else 2.995732, abs=1e-6
        )
    if name == "frozen video tower":
        first = frozen_fast.load_model(tmp_path / "run" / "checkpoints" / "step_00000008").state_dict()
        frozen = [key for key in whole if key.startswith("video_model.blocks")]
        assert frozen and all(torch.equal(first[key], whole[key]) for key in frozen)
