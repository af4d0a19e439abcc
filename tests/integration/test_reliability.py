"""Runs that meet damage, full disks and second writers: what happens to the run folder, and what the user is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock
from frozen_fast.training import checkpoint_keeper, checkpoint_writer
from frozen_fast.training import run as run_module
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import evaluate_checkpoint, train
from support.runs import losses, make_data, read_json, tiny_config, without_reports

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def no_report() -> Iterator[pytest.MonkeyPatch]:
    with without_reports() as patch:
        yield patch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def experiment(data: dict[str, Path], folder: Path, **checkpoints: Any) -> ExperimentConfig:
    return tiny_config(
        data,
        folder,
        checkpoints={"every_steps": 3, "keep": 3, **checkpoints},
        evaluation={"every": "end", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )


@pytest.fixture(scope="module")
def straight(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps; checkpoints of steps 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with without_reports():
        assert train(experiment(data, folder)) == 0
    return folder


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, count: int) -> None:
    """Flip bits spread over a file."""
    content = bytearray(path.read_bytes())
    for index in range(count):
        content[(index + 1) * len(content) // (count + 1)] ^= 0x10
    path.write_bytes(content)


def assert_same_weights(run: Path, straight: Path) -> None:
    (weights, _), (expected, _) = (read_tensors(path / "checkpoints" / "step_00000008") for path in (run, straight))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "flips"), [("model.safetensors", 1), ("model.safetensors", 400), ("training_state.pt", 2000)]
)
def test_a_damaged_newest_checkpoint_is_kept_aside_and_the_one_before_is_used(
    data: dict[str, Path], straight: Path, copy: Path, name: str, flips: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / "checkpoints" / "step_00000008" / name, flips)
    assert train(experiment(data, copy), resume="auto") == 0
    told = capsys.readouterr().err
    assert f"step_00000008: {name} does not match its checksum; renamed to damaged_step_00000008" in told
    assert (copy / "checkpoints" / "damaged_step_00000008" / name).is_file()
    assert losses(copy) == losses(straight)
    assert_same_weights(copy, straight)
    (event,) = read_json_lines(copy / "events.jsonl")
    assert event["kind"] == "damage" and "damaged_step_00000008" in event["message"]


@pytest.mark.parametrize("missing", ["training_state.pt", "model.safetensors", "state.json", "manifest.json"])
def test_a_run_without_a_usable_checkpoint_is_refused_and_nothing_is_deleted(
    data: dict[str, Path], copy: Path, missing: str
) -> None:
    for path in (copy / "checkpoints").glob("step_*"):
        (path / missing).unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"^--resume auto: .* cannot be continued: .*{missing}.*allowed: another run"):
        train(experiment(data, copy), resume="auto")
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert after == before


def test_deleted_checkpoints_do_not_make_a_run_start_over(data: dict[str, Path], copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    expected = "its checkpoints are missing .the last one was of step 8.; allowed: another run"
    with pytest.raises(UserError, match=expected):
        train(experiment(data, copy), resume="auto")
    assert len(losses(copy)) == 8


def test_evaluate_refuses_a_damaged_checkpoint(data: dict[str, Path], copy: Path) -> None:
    checkpoint = copy / "checkpoints" / "step_00000008"
    flip(checkpoint / "model.safetensors", 1)
    with pytest.raises(UserError, match="which is damaged: model.safetensors does not match its checksum"):
        evaluate_checkpoint(experiment(data, copy), str(checkpoint))


def test_damaged_result_files_are_told_and_the_run_continues(
    data: dict[str, Path], straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    (copy / "metrics.json").write_bytes(b"\xff\0")
    (copy / "stages.json").write_text('{"not": "a list"}', encoding="utf-8")
    with (copy / "steps.jsonl").open("ab") as file:
        file.write(b"\0" * 500 + b'\n{"step": 9, "sta')
    assert train(experiment(data, copy), resume="auto") == 0
    told = capsys.readouterr().err
    assert "metrics.json cannot be read: renamed to metrics.damaged_1.json" in told
    assert "steps.jsonl: 2 unreadable line(s) removed" in told
    assert losses(copy) == losses(straight)
    assert_same_weights(copy, straight)


def test_a_second_run_on_the_folder_is_refused_and_the_first_is_not_touched(data: dict[str, Path], copy: Path) -> None:
    lock = RunLock(RunFolder(copy))
    lock.acquire()
    status = (copy / "status.json").read_bytes()
    with pytest.raises(UserError, match=f"which another run is writing to .process {os.getpid()} on"):
        train(experiment(data, copy), resume="auto")
    assert (copy / "status.json").read_bytes() == status and len(losses(copy)) == 8
    lock.release()
    assert train(experiment(data, copy), resume="auto") == 0


class FailingDisk:
    """Checkpoints cannot be written in some attempts."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: range) -> None:
        self.attempts = 0
        self._fails = fails
        self._save = checkpoint_keeper.save_checkpoint
        patch.setattr(checkpoint_keeper, "save_checkpoint", self._refuse)
        patch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.1)

    def _refuse(self, *arguments: Any) -> Path:
        self.attempts += 1
        if self.attempts in self._fails:
            raise checkpoint_writer.CheckpointWriteError("run_folder: could not write (No space left on device)")
        return self._save(*arguments)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_for_a_while_costs_no_run(
    data: dict[str, Path],
    straight: Path,
    tmp_path: Path,
    no_report: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: bool,
) -> None:
    disk = FailingDisk(no_report, range(1, 4))
    config = experiment(data, tmp_path / "run", asynchronous=asynchronous)
    assert train(config) == 0
    assert disk.attempts >= 4
    told = capsys.readouterr().err
    assert told.count("No space left on device); keeping the last valid checkpoint") == 1
    assert "checkpoints can be written again" in told
    assert read_json(tmp_path / "run" / "status.json")["state"] == "done"
    assert_same_weights(tmp_path / "run", straight)
    assert losses(tmp_path / "run") == losses(straight)


def test_a_disk_that_stays_full_ends_the_run_after_the_set_time(
    data: dict[str, Path], tmp_path: Path, no_report: pytest.MonkeyPatch
) -> None:
    FailingDisk(no_report, range(1, 10_000))
    config = experiment(data, tmp_path / "run", give_up_minutes=0.01)
    with pytest.raises(UserError, match="No space left on device"):
        train(config)
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_a_report_that_fails_does_not_make_the_run_fail(
    data: dict[str, Path], tmp_path: Path, no_report: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    no_report.setattr(run_module, "write_report", fail)
    assert train(experiment(data, tmp_path / "run")) == 0
    assert read_json(tmp_path / "run" / "status.json")["state"] == "done"
    told = capsys.readouterr().err
    assert "the report could not be written (OSError: [Errno 28] No space left" in told


def test_usr1_saves_and_the_run_continues(data: dict[str, Path], tmp_path: Path, no_report: pytest.MonkeyPatch) -> None:
    original = Journal.add

    def add(self: Journal, result: Any, meter: Any) -> None:
        original(self, result, meter)
        if result.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    no_report.setattr(Journal, "add", add)
    assert train(experiment(data, tmp_path / "run", every_steps=0, keep=9)) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert names == ["step_00000002", "step_00000004", "step_00000008"]


def test_checkpoints_come_by_minutes_too(data: dict[str, Path], tmp_path: Path) -> None:
    config = experiment(data, tmp_path / "run", every_steps=0, every_minutes=1e-9, keep=9)
    assert train(config) == 0
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 8


def test_a_run_tells_its_process_its_heartbeat_and_its_last_checkpoint(straight: Path) -> None:
    status = read_json(straight / "status.json")
    assert status["pid"] == os.getpid() and status["checkpoint"] == 8
    assert status["heartbeat"] >= json.loads((straight / "steps.jsonl").read_text().splitlines()[-1])["time"]
