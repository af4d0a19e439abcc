"""A step that is not finite: stop, skip and roll_back in one process, and what is written of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_state, read_tensors
from frozen_fast.training.run import train
from support.faults import Fault, replacing_faults
from support.runs import losses, make_data, read_json, tiny_config, without_reports

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return replacing_faults(monkeypatch)


def experiment(
    data: dict[str, Path], folder: Path, policy: str, *, every: int = 1, **training: Any
) -> ExperimentConfig:
    """Four steps of one frame, four of four."""
    optimizer = training.pop("optimizer", {})
    return tiny_config(
        data,
        folder,
        training={"device": "cpu", "precision": "fp32", "on_non_finite": policy, **training},
        checkpoints={"every_steps": every, "keep": 20},
        optimizer={"learning_rate": 1e-3, **optimizer},
    )


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def flat(folder: Path, step: int) -> dict[str, torch.Tensor]:
    weights, state = read_tensors(checkpoint(folder, step))
    return {**weights, **{f"{name}/{key}": value for name, kept in state.items() for key, value in kept.items()}}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    "optimizer",
    [
        {"fused": "on"},
        {"fused": "off", "gradient_clip_norm": 1.0},
        {"fused": "on", "weight_average_decay": 0.9},
        {"name": "lamb"},
        {"name": "ranger", "fused": "on"},
    ],
    ids=["fused", "clipped", "averaged", "lamb", "ranger"],
)
def test_a_skipped_step_changes_neither_weights_nor_optimizer(
    data: dict[str, Path], tmp_path: Path, fault: Fault, optimizer: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    fault(nan_at=[3])
    assert train(experiment(data, folder, "skip", optimizer=optimizer)) == 0
    assert_equal(flat(folder, 3), flat(folder, 2))
    moved = [name for name, tensor in flat(folder, 4).items() if not torch.equal(tensor, flat(folder, 3)[name])]
    assert moved, "the next step trains on"
    rows = read_json_lines(folder / "steps.jsonl")
    assert [row["skipped"] for row in rows] == [row["step"] == 3 for row in rows] and len(rows) == 8
    assert (rows[2]["loss"], rows[2]["gradient_norm"]) == (None, None)
    assert all(row["gradient_norm"] > 0 for row in rows if row["step"] != 3), "also without clipping"
    (lost,) = read_json_lines(folder / "non_finite.jsonl")
    assert (lost["step"], lost["stage"], lost["source"], lost["action"]) == (3, 0, "videos", "skip")
    assert len(lost["clip_ids"]) == 4
    assert read_json(folder / "status.json")["state"] == "done"


def test_a_run_resumes_exactly_after_a_skipped_step(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    fault(nan_at=[3, 6])
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert train(experiment(data, straight, "skip", every=2)) == 0
    shutil.copytree(straight, cut)
    for step in (6, 8):
        shutil.rmtree(checkpoint(cut, step))
    assert train(experiment(data, cut, "skip", every=2), resume="auto") == 0
    assert_equal(flat(cut, 8), flat(straight, 8))
    assert losses(cut) == losses(straight)
    assert [row["step"] for row in read_json_lines(cut / "non_finite.jsonl")] == [3, 6]


def test_stop_names_the_step_and_leaves_the_clips_in_a_file(
    data: dict[str, Path], tmp_path: Path, fault: Fault
) -> None:
    folder = tmp_path / "run"
    fault(nan_at=[6])
    told = (
        r"^loss: got nan at step 6 \(stage 1, 4 frames, source videos\); its clips are in non_finite.jsonl; allowed: "
    )
    with pytest.raises(UserError, match=told) as caught:
        train(experiment(data, folder, "stop"))
    assert "\n" not in str(caught.value)
    (lost,) = read_json_lines(folder / "non_finite.jsonl")
    assert (lost["step"], lost["action"], len(lost["clip_ids"])) == (6, "stop", 4)
    assert read_json(folder / "status.json")["exit_code"] == 2 and len(losses(folder)) == 5
    with pytest.raises(UserError, match="got nan at step 6"):
        train(experiment(data, folder, "stop"), resume="auto")
    assert len(read_json_lines(folder / "non_finite.jsonl")) == 2, "both times"


def test_too_many_skipped_steps_in_a_row_end_the_run(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    fault(nan_at=range(2, 99))
    with pytest.raises(UserError, match=r"at step 5 .* after 3 skipped steps in a row \(training.max_skips\)"):
        train(experiment(data, tmp_path / "run", "skip", max_skips=3))


def test_roll_back_goes_on_from_the_last_checkpoint_with_other_clips(
    data: dict[str, Path], tmp_path: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    """Back over the stage change: the checkpoint before it has learned one frame."""
    folder, again = tmp_path / "run", tmp_path / "again"
    fault(nan_at=[6], seed=1)
    assert train(experiment(data, folder, "roll_back", every=3)) == 0
    assert len(losses(folder)) == 8 and None not in losses(folder)
    assert "roll-back 1: loss: got nan at step 6" in capsys.readouterr().err
    (event,) = read_json_lines(folder / "events.jsonl")
    assert event["kind"] == "roll_back" and event["message"].endswith(
        "back to step_00000004, with another order of the clips"
    )
    assert [row["action"] for row in read_json_lines(folder / "non_finite.jsonl")] == ["roll_back"]
    assert read_state(checkpoint(folder, 3)).rollbacks == 0
    assert [read_state(checkpoint(folder, step)).rollbacks for step in (4, 6, 8)] == [1, 1, 1]
    # A run that resumes after a roll-back takes the order that it had then.
    shutil.copytree(folder, again)
    for step in (6, 8):
        shutil.rmtree(checkpoint(again, step))
    assert train(experiment(data, again, "roll_back", every=3), resume="auto") == 0
    assert losses(again) == losses(folder)
    assert_equal(flat(again, 8), flat(folder, 8))


def test_a_roll_back_without_a_checkpoint_starts_anew(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    folder, plain = tmp_path / "run", tmp_path / "plain"
    fault(nan_at=[2], seed=1)
    assert train(experiment(data, folder, "roll_back", every=0)) == 0
    (event,) = read_json_lines(folder / "events.jsonl")
    assert "back to the first step" in event["message"] and len(losses(folder)) == 8
    fault(nan_at=[])
    assert train(experiment(data, plain, "stop", every=0)) == 0
    assert losses(folder)[0] != losses(plain)[0], "other clips from the first step on"


def test_roll_backs_that_do_not_help_end_the_run(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "run"
    fault(nan_at=[3])
    told = r"^loss: got nan at step 3 .*; rolled back 2 times already \(training.max_roll_backs\)$"
    with pytest.raises(UserError, match=told):
        train(experiment(data, folder, "roll_back", max_roll_backs=2))
    assert len(read_json_lines(folder / "events.jsonl")) == 2
    assert read_json(folder / "status.json")["exit_code"] == 2
    with pytest.raises(UserError, match="rolled back 2 times already"):
        train(experiment(data, folder, "roll_back", max_roll_backs=2), resume="auto")


def test_deterministic_runs_equal_others_on_a_cpu_and_a_missing_operator_is_named(
    data: dict[str, Path], tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert train(experiment(data, tmp_path / "plain", "stop", every=0)) == 0
    assert train(experiment(data, tmp_path / "same", "stop", every=0, deterministic=True)) == 0
    assert losses(tmp_path / "same") == losses(tmp_path / "plain")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.are_deterministic_algorithms_enabled()
    original = torch.nn.functional.normalize

    def without_a_form(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and x.ndim == 2:
            place = torch.zeros(1, dtype=torch.long)
            x.detach().clone().put_(place, x.detach().flatten()[:1], accumulate=False)
        return original(x, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "normalize", without_a_form)
    with pytest.raises(
        UserError, match="^training.deterministic: got true, but put_ has no deterministic form"
    ) as caught:
        train(experiment(data, tmp_path / "refused", "stop", deterministic=True))
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"^training.deterministic: got CUBLAS_WORKSPACE_CONFIG=:0:0; allowed: :4096:8"):
        train(experiment(data, tmp_path / "cublas", "stop", deterministic=True))
