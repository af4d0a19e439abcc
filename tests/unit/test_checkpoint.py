"""Checkpoints: complete or absent, the last good one always there, and only the same run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frozen_fast.errors import UserError
from frozen_fast.records import checkpoint as module
from frozen_fast.records.checkpoint import RunState, checkpoint_name, read_state, read_tensors, save_checkpoint, verify
from frozen_fast.records.checkpoint_folder import Retention, checkpoints, prune, remove_leftovers, set_aside, survey
from frozen_fast.records.same_run import check_same_run


def state(step: int = 7, **changes: object) -> RunState:
    base = RunState(
        step=step,
        stage=1,
        steps_in_stage=2,
        stage_complete=False,
        position={"step": step, "consumed": {"a": 40}},
        meter={"clips": 12},
        bad_clips={"clips": 40, "causes": {"empty": 1}},
        learned_frames=4,
        config={"seed": 3},
        world_size=1,
        sources={"a": "f"},
    )
    return replace(base, **changes)


def optimizer_state(value: float) -> dict:
    return {"w": {"exp_avg": torch.full((3,), value), "exp_avg_sq": torch.full((3,), value), "step": torch.tensor(7.0)}}


def save(folder: Path, step: int, value: float = 1.0, keep: int = 2, **changes: object) -> Path:
    def write_model(temporary: Path) -> None:
        save_file({"w": torch.full((3,), value)}, temporary / "model.safetensors")

    path = save_checkpoint(folder, state(step, **changes), write_model, optimizer_state(value))
    prune(folder, Retention(newest=keep))
    return path


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 7, value=0.1)
    assert path.name == "step_00000007"
    assert read_state(path) == state(7)
    weights, optimizer = read_tensors(path)
    assert torch.equal(weights["w"], torch.full((3,), 0.1))
    assert all(torch.equal(optimizer["w"][key], tensor) for key, tensor in optimizer_state(0.1)["w"].items())


def test_the_newest_are_kept_and_sorted_by_step(tmp_path: Path) -> None:
    for step in (9, 10, 100, 11):
        save(tmp_path, step, keep=10)
    save(tmp_path, 101, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == [checkpoint_name(step) for step in (101, 100, 11)]


def test_older_ones_go_only_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def fail_before_rename(temporary: Path, final: Path) -> None:
        assert all((temporary / name).exists() for name in ("model.safetensors", "training_state.pt", "state.json"))
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_move_into_place", fail_before_rename)
    with pytest.raises(UserError, match="could not write checkpoint .*step_00000002 .*No space left"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert read_state(tmp_path / "step_00000001").step == 1


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import module, save
module._move_into_place = lambda temporary, final: os.kill(os.getpid(), signal.SIGKILL)
save(Path(sys.argv[1]), 2, keep=1)
"""


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_previous_one_good(tmp_path: Path) -> None:
    save(tmp_path, 1, value=0.5, keep=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(leftovers) == 1
    newest = survey(tmp_path).usable
    assert newest is not None and newest.name == "step_00000001"
    assert torch.equal(read_tensors(newest)[0]["w"], torch.full((3,), 0.5))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_incomplete_and_damaged_ones_are_named_and_kept_aside(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=5)
    (save(tmp_path, 2, keep=5) / "state.json").write_text("{", encoding="utf-8")
    (save(tmp_path, 3, keep=5) / "training_state.pt").unlink()
    found = survey(tmp_path)
    assert found.usable == tmp_path / "step_00000001"
    reasons = [why.rpartition(": ")[2] for why in found.damaged.values()]
    assert reasons[0] == "training_state.pt is missing" and "state.json" in list(found.damaged.values())[1]
    told = set_aside(found.damaged)
    assert ["renamed to damaged_step_0000000" in line for line in told] == [True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged_step_00000002",
        "damaged_step_00000003",
        "step_00000001",
    ]
    assert survey(tmp_path / "nowhere").usable is None


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_or_a_truncation_is_always_seen(tmp_path: Path, seed: int) -> None:
    """One random change to one random file of the newest checkpoint: the one before is used."""
    save(tmp_path, 1, keep=5)
    newest = save(tmp_path, 2, keep=5)
    rng = random.Random(seed)
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    found = survey(tmp_path)
    assert found.usable == tmp_path / "step_00000001"
    assert list(found.damaged) == [newest]
    with pytest.raises(UserError, match="step_00000002") as caught:
        verify(newest)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_from_before_checksums_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 1)
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for key in ("sha256", "manifest_sha256", "rollbacks"):
        del values[key]
    (path / "state.json").write_text(json.dumps({**values, "format": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="state.json does not match its checksum"):
        verify(path)  # a manifest shows that the checksum was taken away
    (path / "manifest.json").unlink()
    assert verify(path) == state(1)
    assert "its files are not verified" in caplog.text


def test_a_disk_that_returns_other_bytes_is_noticed_before_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush_and_lose_a_bit(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    save(tmp_path, 1)
    monkeypatch.setattr(module, "_flush", flush_and_lose_a_bit)
    with pytest.raises(UserError, match="read back after writing, model.safetensors does not match"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_every_nth_and_the_ends_of_stages_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step, keep=20, stage_complete=step in (3, 7))
    prune(tmp_path, Retention(newest=1, every_steps=4, stage_ends=True))
    assert [int(path.name[-2:]) for path in checkpoints(tmp_path)] == [9, 8, 7, 4, 3]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "state.json").write_text("{", encoding="utf-8")
    save(tmp_path, 2, value=5.0)
    assert read_state(tmp_path / "step_00000002").step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_damaged_tensors_are_one_line(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (path / name).write_bytes(b"not this")
    with pytest.raises(UserError, match="step_00000001: cannot be read") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


class RunsCode:
    def __reduce__(self) -> tuple:
        return (os.system, ("true",))


def test_code_in_a_training_state_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"format": 1, "optimizer": RunsCode()}, path / "training_state.pt")
    with pytest.raises(
        UserError, match=r"cannot be read \(UnpicklingError: the file contains objects other than tensors\)$"
    ):
        read_tensors(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps({**values, "format": 99}), encoding="utf-8")
    with pytest.raises(UserError, match="got format 99; allowed: 2"):
        read_state(path)


BASE = {
    "seed": 0,
    "model": {"video": {"attention": "auto", "size": "a"}},
    "data": {"sources": [{"name": "x", "path": "here"}], "decode": {"workers": 0}},
    "optimizer": {"betas": [0.9, 0.99], "fused": "auto"},
    "training": {"log_every_steps": 10, "precision": "fp32"},
}


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {**BASE["data"], "decode": {"workers": 4}}),
        ("data", {**BASE["data"], "sources": [{"name": "x", "path": "there"}]}),
        ("training", {"log_every_steps": 1, "precision": "fp32"}),
        ("model", {"video": {"attention": "sdpa", "size": "a"}}),
    ],
)
def test_settings_of_speed_and_place_may_change(section: str, change: dict) -> None:
    differences = check_same_run(BASE, {**BASE, section: change})
    assert len(differences) == 1 and " -> " in differences[0]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed was 0, got 1"),
        ({"optimizer": {"betas": [0.9, 0.95], "fused": "auto"}}, r"optimizer.betas\[1\] was 0.99, got 0.95"),
        ({"training": {"log_every_steps": 10, "precision": "bf16"}}, "training.precision was 'fp32', got 'bf16'"),
        ({"model": {"video": {"attention": "auto", "size": "b"}}}, "model.video.size was 'a', got 'b'"),
        ({"data": {**BASE["data"], "sources": []}}, r"data.sources"),
    ],
)
def test_settings_of_meaning_may_not(change: dict, key: str) -> None:
    with pytest.raises(UserError, match=f"^--resume: the config differs from that of the run: .*{key}"):
        check_same_run(BASE, {**BASE, **change})
