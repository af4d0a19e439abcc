"""Runs that continue past their end (--extend), end before it (evaluation.patience), and averaged checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast import load_model
from frozen_fast.cli.main import main
from frozen_fast.config import ExperimentConfig, config_from_mapping, dump_yaml
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_state, read_tensors
from frozen_fast.training import checkpoint_keeper as keeper_module
from frozen_fast.training.run import train
from support.runs import losses, make_data, read_json, tiny_mapping, without_reports

pytestmark = pytest.mark.integration

VALUES = {6: 3.0, 12: 1.0, 18: 2.0, 24: 1.5, 30: 0.5}
"""What the evaluation after each epoch of six steps is said to have given."""


@pytest.fixture(autouse=True, scope="module")
def patches() -> Iterator[None]:
    with without_reports() as patch:
        patch.setattr(keeper_module, "selection_value", lambda metric, row: VALUES[row["step"]])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def experiment(data: dict[str, Path], folder: Path, epochs: float, **sections: Any) -> ExperimentConfig:
    """24 clips in batches of 4: an epoch is six steps."""
    tree = {
        "curriculum": {"stages": [{"frames": 2, "global_batch_size": 4, "share": 1.0}], "budget_epochs": epochs},
        "checkpoints": {"every_steps": 0, "keep": 3},
        **sections,
    }
    return config_from_mapping(tiny_mapping(data, folder, **tree))


def evaluated(data: dict[str, Path], **options: Any) -> dict[str, Any]:
    source = {"name": "held_out", "path": str(data["videos"]), "max_clips": 6}
    return {"every": "epoch", "keep_best": "validation_loss", "sources": [source], **options}


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in read_json(run / "metrics.json")["evaluations"]]


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(data: dict[str, Path], tmp_path: Path) -> None:
    """At a constant learning rate to the last bit; the evaluation at the first end stays in metrics.json."""
    longer, extended = tmp_path / "longer", tmp_path / "extended"
    sections = {"evaluation": evaluated(data, keep_best="none", every="end")}
    assert train(experiment(data, longer, 2.0, **sections)) == 0
    assert train(experiment(data, extended, 1.0, **sections)) == 0
    assert read_json(extended / "status.json")["state"] == "done"
    with pytest.raises(UserError, match="^--resume: the config differs from that of the run: curriculum.budget_epochs"):
        train(experiment(data, extended, 2.0, **sections), resume="auto")
    assert train(experiment(data, extended, 2.0, **sections), resume="extend") == 0
    assert losses(extended) == losses(longer) and len(losses(longer)) == 12
    ours, expected = (read_tensors(run / "checkpoints" / "step_00000012") for run in (extended, longer))
    assert all(torch.equal(ours[0][name], tensor) for name, tensor in expected[0].items())
    assert steps_of(extended) == [6, 12] and steps_of(longer) == [12]
    (row,) = read_json(extended / "stages.json")
    assert row["steps"] == 12 and row["clips"] == 48
    assert train(experiment(data, extended, 2.0, **sections), resume="auto") == 0, "a finished run stays finished"
    assert len(losses(extended)) == 12


def test_finished_stages_keep_their_steps(data: dict[str, Path], tmp_path: Path) -> None:
    stages = [
        {"frames": 1, "global_batch_size": 4, "share": 0.5},
        {"frames": 2, "global_batch_size": 4, "share": 0.5},
    ]
    run = tmp_path / "run"
    for epochs, resume in ((2.0, "none"), (4.0, "extend")):
        config = experiment(data, run, epochs, curriculum={"stages": stages, "budget_epochs": epochs})
        assert train(config, resume=resume) == 0
    assert [row["steps"] for row in read_json(run / "stages.json")] == [6, 12]
    state = read_state(run / "checkpoints" / "step_00000018")
    assert (state.stage, state.steps_in_stage, state.learned_frames) == (1, 12, 2)


def test_what_cannot_be_extended_is_told(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--extend: got a run_folder without a checkpoint"):
        train(experiment(data, tmp_path / "none", 1.0), resume="extend")
    run = tmp_path / "run"
    assert train(experiment(data, run, 0.5)) == 0
    with pytest.raises(UserError, match="^--extend: got 3 steps for the last stage, which has done 3; allowed: more"):
        train(experiment(data, run, 0.5), resume="extend")
    with pytest.raises(UserError, match="^--resume: the config differs from that of the run: optimizer.learning_rate"):
        train(experiment(data, run, 1.0, optimizer={"learning_rate": 1e-5}), resume="extend")


def test_a_run_ends_when_no_evaluation_is_better_for_so_long(data: dict[str, Path], tmp_path: Path) -> None:
    """The best is at step 12; 18 and 24 are worse. Resumed, the run stays as it is; extended, the count begins anew."""
    run = tmp_path / "run"
    config = experiment(data, run, 5.0, evaluation=evaluated(data, patience=2))
    assert train(config) == 0
    assert steps_of(run) == [6, 12, 18, 24] and len(losses(run)) == 24
    assert os.readlink(run / "checkpoints" / "best") == "step_00000012"
    assert read_json(run / "status.json")["state"] == "done" and len(read_json(run / "stages.json")) == 1
    assert train(config, resume="auto") == 0
    assert len(losses(run)) == 24 and steps_of(run) == [6, 12, 18, 24]
    assert train(config, resume="extend") == 0
    assert steps_of(run) == [6, 12, 18, 24, 30] and os.readlink(run / "checkpoints" / "best") == "step_00000030"


def test_patience_needs_a_metric(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^evaluation.patience: got 2 with keep_best: none"):
        experiment(data, tmp_path, 1.0, evaluation={"patience": 2})


def test_the_average_of_checkpoints_is_the_mean_of_their_weights(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "average"
    assert train(experiment(data, run, 1.0, checkpoints={"every_steps": 2, "keep": 3})) == 0
    assert main(["average-checkpoints", str(run), "--last", "3", "--output", str(output)]) == 0
    states = [read_tensors(run / "checkpoints" / f"step_{step:08d}")[0] for step in (2, 4, 6)]
    model = load_model(output)
    for name, tensor in model.state_dict().items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.allclose(tensor.double(), mean, atol=1e-6), name
    assert not torch.equal(states[0]["vid_proj.0.weight"], states[2]["vid_proj.0.weight"])
    assert model.encode_text(["clip number 1"]).shape == (1, 16), "the tokenizer came along"
    capsys.readouterr()
    assert main(["average-checkpoints", str(run), "--last", "4", "--output", str(tmp_path / "x")]) == 2
    assert "--last: got 4 where" in capsys.readouterr().err
    assert main(["average-checkpoints", str(run), "--last", "2", "--output", str(output)]) == 2
    assert "--output: got" in capsys.readouterr().err


def test_extend_is_a_flag_of_train(data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(experiment(data, tmp_path / "run", 0.5)), encoding="utf-8")
    assert main(["train", "--config", str(file)]) == 0
    assert main(["train", "--config", str(file), "--extend", "curriculum.budget_epochs=1.0"]) == 0
    assert len(losses(tmp_path / "run")) == 6
    assert main(["train", "--config", str(file), "--extend", "--resume", "auto"]) == 2
    assert "--extend: got it with --resume auto" in capsys.readouterr().err
