"""Runs on a file system that fills up: during a checkpoint, for good, to the last byte, during the report."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast import load_model
from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.records.checkpoint_folder import survey
from frozen_fast.training import checkpoint_writer
from frozen_fast.training import run as run_module
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import train
from support.runs import losses, make_data, read_json, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DISK_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of DISK_BYTES."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Take every byte that is free."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\1" * size)
    assert os.statvfs(disk).f_bavail == 0


def after_step(patch: pytest.MonkeyPatch, actions: dict[int, Any]) -> None:
    """Call something right after a step is recorded."""
    original = Journal.add

    def add(self: Journal, result: Any, meter: Any) -> None:
        original(self, result, meter)
        actions.get(result.step, lambda: None)()

    patch.setattr(Journal, "add", add)


def experiment(data: dict[str, Path], disk: Path, **checkpoints: Any) -> ExperimentConfig:
    return tiny_config(
        data,
        disk / "run",
        checkpoints={"every_steps": 2, "keep": 3, **checkpoints},
        evaluation={"every": "stage", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )


def newest_loads(run: Path, step: int) -> None:
    """The newest checkpoint is whole, of a step, and a model."""
    found = survey(run / "checkpoints")
    assert found.usable is not None and not found.damaged and found.usable.name == f"step_{step:08d}"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in read_tensors(found.usable)[0].values())
    load_model(found.usable)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_during_a_checkpoint_and_freed_later(
    data: dict[str, Path],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: bool,
) -> None:
    """Full before the first checkpoint, so that there is nothing to delete."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.2)
    after_step(monkeypatch, {1: lambda: fill(disk), 5: (disk / "filler").unlink})
    assert train(experiment(data, disk, asynchronous=asynchronous)) == 0
    told = capsys.readouterr().err
    assert "No space left on device" in told and "checkpoints can be written again" in told
    assert read_json(disk / "run" / "status.json")["state"] == "done"
    assert len(losses(disk / "run")) == 8
    assert len(read_json(disk / "run" / "metrics.json")["evaluations"]) == 2
    assert (disk / "run" / "report.md").stat().st_size > 0
    newest_loads(disk / "run", 8)


def test_a_disk_with_space_for_fewer_checkpoints_than_are_kept(
    data: dict[str, Path], disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full for good after the second checkpoint: older ones make space for newer ones."""
    after_step(monkeypatch, {5: lambda: fill(disk)})
    assert train(experiment(data, disk, asynchronous=False)) == 0
    told = capsys.readouterr().err
    assert "is full: deleted step_00000002 (checkpoints.keep=3) to make space for a newer checkpoint" in told
    assert read_json(disk / "run" / "status.json")["state"] == "done"
    newest_loads(disk / "run", 8)


def test_a_disk_that_is_full_during_the_report(
    data: dict[str, Path], disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = run_module.write_report

    def write(folder: Path) -> tuple[Path, Path]:
        fill(disk)
        return original(folder)

    monkeypatch.setattr(run_module, "write_report", write)
    assert train(experiment(data, disk)) == 0
    assert "the report could not be written (OSError: [Errno 28] No space left" in capsys.readouterr().err
    assert read_json(disk / "run" / "status.json")["state"] == "done"
    newest_loads(disk / "run", 8)
    (disk / "filler").unlink()
    original(disk / "run")


def test_a_disk_full_to_the_last_byte_ends_the_run_with_its_word_in_the_status(
    data: dict[str, Path], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is there, nothing can be saved after it, for checkpoints.give_up_minutes."""
    after_step(monkeypatch, {3: lambda: fill(disk)})
    with pytest.raises(UserError, match="No space left on device"):
        train(experiment(data, disk, give_up_minutes=0.02))
    status = read_json(disk / "run" / "status.json")
    assert (status["state"], status["exit_code"], status["checkpoint"]) == ("failed", 2, 2)
    newest_loads(disk / "run", 2)
    with pytest.raises(UserError, match="run_folder: got .*run.; allowed: a folder that can be written to"):
        train(experiment(data, disk), resume="auto")
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert train(experiment(data, disk), resume="auto") == 0
    assert not [path for path in (disk / "run").rglob("*.tmp") if "wandb" not in path.parts]
    newest_loads(disk / "run", 8)
