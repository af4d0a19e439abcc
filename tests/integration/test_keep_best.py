"""Evaluation after every epoch and checkpoints/best: the lowest loss is kept, whatever ends a run in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast import DualEncoder
from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_state, read_tensors
from frozen_fast.training import checkpoint_keeper as keeper_module
from frozen_fast.training import retrieval_task as task_module
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import evaluate_checkpoint, train
from support.runs import losses, make_data, read_json, tiny_mapping, without_reports

pytestmark = pytest.mark.integration

# What the evaluations after each epoch of six steps, and after the last step, are said to have given.
VALUES = {6: 3.0, 12: 1.0, 18: 2.0, 20: 1.0}


@pytest.fixture(autouse=True, scope="module")
def patches() -> Iterator[None]:
    """Chosen values, so that the best is in the middle."""
    with without_reports() as patch:
        patch.setattr(keeper_module, "selection_value", lambda metric, row: VALUES[row["step"]])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def experiment(data: dict[str, Path], folder: Path, **evaluation: Any) -> ExperimentConfig:
    """24 clips in batches of 4: an epoch is six steps. One checkpoint is kept beside the best."""
    mapping = tiny_mapping(
        data,
        folder,
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 20}]},
        checkpoints={"every_steps": 7, "keep": 1},
        evaluation={
            "every": "epoch",
            "keep_best": "validation_loss",
            "sources": [{"name": "held_out", "path": str(data["videos"]), "max_clips": 10}],
            **evaluation,
        },
    )
    return config_from_mapping(mapping)


@pytest.fixture(scope="module")
def straight(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train(experiment(data, folder)) == 0
    return folder


def evaluations(run: Path) -> list[tuple[int, float, dict[str, float]]]:
    rows = read_json(run / "metrics.json")["evaluations"]
    return [(row["step"], row["loss"], row["metrics"]) for row in rows]


def assert_same(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    assert evaluations(run) == evaluations(straight)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "step_00000012", "step_00000020"}
    weights, expected = (read_tensors(folder / "checkpoints" / "best")[0] for folder in (run, straight))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert read_state(run / "checkpoints" / "step_00000020").best == {
        "step": 12,
        "metric": "validation_loss",
        "value": 1.0,
    }
    assert len(read_json(run / "stages.json")) == 1


def test_the_best_of_the_epochs_stays_beside_the_newest(data: dict[str, Path], straight: Path) -> None:
    """Of two equal values the earlier is the best."""
    assert [step for step, _, _ in evaluations(straight)] == [6, 12, 18, 20]
    assert_same(straight, straight)
    best = straight / "checkpoints" / "best"
    assert os.readlink(best) == "step_00000012"
    assert read_state(best).step == 12 and read_state(best).evaluated
    assert DualEncoder.from_pretrained(best).learned_frames == 1


def test_evaluating_the_best_gives_its_numbers_again(data: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    best = straight / "checkpoints" / "best"
    (row,) = evaluate_checkpoint(experiment(data, tmp_path), str(best))["evaluations"]
    (expected,) = (row for row in evaluations(straight) if row[0] == 12)
    assert row["metrics"] == expected[2] and row["loss"] == pytest.approx(expected[1], rel=1e-6)
    assert row["loss_batch_size"] == 4


def test_a_run_goes_on_from_the_best_in_a_folder_of_its_own_only(
    data: dict[str, Path], straight: Path, tmp_path: Path
) -> None:
    best = str(straight / "checkpoints" / "best")
    with pytest.raises(UserError, match="^--resume: got .*/best', but this run has got to step_00000020"):
        train(experiment(data, straight), resume=best)
    assert train(experiment(data, tmp_path / "run"), resume=best) == 0
    assert [step for step, _, _ in evaluations(tmp_path / "run")] == [18, 20]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "step_00000020"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class MachineGoneError(Exception):
    """No error of the disk, which would be tried again."""


def crash() -> None:
    raise MachineGoneError


def after_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    original = Journal.add

    def add(self: Journal, result: Any, meter: Any) -> None:
        original(self, result, meter)
        if result.step == step:
            act()

    patch.setattr(Journal, "add", add)


def before_evaluation(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    original, calls = task_module.evaluate_with, [0]

    def evaluate(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(*arguments, **options)

    patch.setattr(task_module, "evaluate_with", evaluate)


def at_link(patch: pytest.MonkeyPatch, step: int) -> None:
    original = keeper_module.link_best

    def link(folder: Path, linked: int) -> None:
        if linked == step:
            crash()
        original(folder, linked)

    patch.setattr(keeper_module, "link_best", link)


@pytest.mark.parametrize(
    ("interrupt", "code"),
    [
        (lambda patch: after_step(patch, 11, terminate), 75),  # stops after 12, whose evaluation is still to come
        (lambda patch: before_evaluation(patch, 2, terminate), 75),  # in the evaluation after 12
        (lambda patch: before_evaluation(patch, 4, crash), None),  # after the last step
        (lambda patch: after_step(patch, 13, crash), None),  # goes on from 12, which is evaluated already
        (lambda patch: at_link(patch, 12), None),  # the checkpoint knows that it is the best, the link does not
    ],
    ids=["told before", "told within", "crash at the end", "crash after", "crash before the link"],
)
def test_an_interrupted_run_keeps_the_same_best(
    data: dict[str, Path],
    straight: Path,
    tmp_path: Path,
    interrupt: Callable[[pytest.MonkeyPatch], None],
    code: int | None,
) -> None:
    config = experiment(data, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        if code is None:
            with pytest.raises(MachineGoneError):
                train(config)
        else:
            assert train(config) == code
    assert len(losses(tmp_path / "run")) < 20 or not (tmp_path / "run" / "stages.json").exists()
    assert train(config, resume="auto") == 0
    assert_same(tmp_path / "run", straight)


def test_epochs_are_evaluated_without_extra_checkpoints_where_no_best_is_kept(
    data: dict[str, Path], straight: Path, tmp_path: Path
) -> None:
    """Evaluating in between changes no step; a run that goes on evaluates again what was cut off."""
    config = experiment(data, tmp_path / "run", keep_best="none")
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 13, crash)
        with pytest.raises(MachineGoneError):
            train(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]
    assert [step for step, _, _ in evaluations(tmp_path / "run")] == [6, 12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper_module, "selection_value", lambda metric, row: None)
        assert train(config, resume="auto") == 0
    assert losses(tmp_path / "run") == losses(straight)
    assert evaluations(tmp_path / "run") == evaluations(straight)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000020"]
