"""The sweep's driver, with a stand-in for training that takes milliseconds: results, limits, resuming, halving, W&B."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.sweep.devices import device_groups, free_gpus
from frozen_fast.sweep.driver import Sweep
from frozen_fast.sweep.outcome import whole_lines
from frozen_fast.sweep.space import Trial, enumerate_trials
from frozen_fast.sweep.sweep_file import read_sweep
from frozen_fast.sweep.trial_runner import TrialRunner
from frozen_fast.sweep.winner import write_winner
from support.runs import REPOSITORY

SWEEPS = sorted(path.name for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml"))
SETTING = "optimizer.warmup_steps"  # an integer key: the stand-in takes its value for what is to happen
WORKS, SLOW, NAN, KILLED, REFUSED, CRASHES = 1, 2, 3, 4, 5, 6

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
settings = dict(text.split("=", 1) for text in sys.argv[1:])
folder, what = Path(settings["run_folder"]), int(settings["optimizer.warmup_steps"])
(folder / "checkpoints").mkdir(parents=True)
with Path(settings["name"]).open("a") as starts:
    starts.write(f"{what}\\n")
if what == 2:
    time.sleep(60)
if what == 3:
    sys.exit("error: loss: got nan at step 2 (stage 0, 1 frames, source x); allowed: finite numbers; lower it")
if what == 4:
    sys.stderr.write("subprocess.CalledProcessError: Command 'x' died with <Signals.SIGKILL: 9>.\\n")
    sys.exit(1)
if what == 5:
    sys.exit("error: model.video.size: got 'x'; allowed: y")
if what == 6:
    raise RuntimeError("of its own")
stage = {"clips": 100, "clips_per_second": float(what), "stall_share": 0.1, "num_devices": 1,
         "peak_memory_bytes": 7, "mfu_datasheet": None}
(folder / "stages.json").write_text(json.dumps([stage]))
"""


class QuickRunner(TrialRunner):
    """Runs the stand-in instead of accelerate launch."""

    def command(self, trial: Trial, rung_overrides: Sequence[str], run_folder: Path) -> list[str]:
        starts = self.folder.parent.parent / "starts.txt"
        overrides = [text for text in self.overrides(trial, rung_overrides) if "=" in text]
        return [sys.executable, "-c", STAND_IN, *overrides, f"run_folder={run_folder}", f"name={starts}"]


def make_sweep(folder: Path, values: Sequence[int], **keys: Any) -> Sweep:
    again = keys.pop("again", ())
    (folder / "experiment.yaml").write_text("name: x\n")
    tree = {"experiment": "experiment.yaml", "axes": {SETTING: list(values)}, "limits": {"seconds": 30}, **keys}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    config = read_sweep(folder / "sweep.yaml")
    sweep = Sweep(config, folder=folder / "results", train_script=Path("train.py"), again=again)
    sweep.runner = QuickRunner(config, folder=sweep.folder, train_script=Path("train.py"))
    return sweep


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts.txt").read_text().splitlines()]


def causes(sweep: Sweep) -> dict[int, str]:
    return {dict(sweep.trials[row.trial].settings)[SETTING]: row.cause for row in sweep.outcomes}


def test_failures_are_results_with_their_cause(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, [NAN, KILLED, REFUSED, CRASHES, WORKS, 50])
    winner = sweep.run()
    assert winner and dict(sweep.trials[winner.trial].settings)[SETTING] == 50
    assert causes(sweep) == {
        NAN: "nan",
        KILLED: "out_of_memory",
        REFUSED: "refused",
        CRASHES: "crash",
        WORKS: "ok",
        50: "ok",
    }
    table = (tmp_path / "results" / "ranking.md").read_text()
    for words in ("nan: error: loss: got nan", "refused: error: model.video.size", "crash: RuntimeError: of its own"):
        assert words in table
    assert table.index("| 1 | 50.00 |") < table.index("| 2 | 1.00 |") < table.index("| - |")
    assert "<svg" in (tmp_path / "results" / "speeds.svg").read_text()
    assert not list((tmp_path / "results").glob("trials/*/checkpoints"))
    won = load_config(tmp_path / "results" / "winner.yaml")
    assert won.optimizer.warmup_steps == 50


def test_a_mistyped_key_of_a_listed_trial_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trials: optimizer.warmup_stepz: got an unknown key"):
        make_sweep(tmp_path, [WORKS], trials=[{"optimizer.warmup_stepz": 7}])
    assert not (tmp_path / "starts.txt").exists()


def test_the_winners_command_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.yaml").write_text("name: x\n")
    trial = Trial(settings=((SETTING, 7),))
    path, _ = write_winner(
        Path("results"), Path("experiment.yaml"), trial, None, train_script=REPOSITORY / "train.py", environment={}
    )
    command = path.read_text().splitlines()[1].removeprefix("# ")
    words = [word for word in command.split() if word.endswith((".py", ".yaml"))]
    assert len(words) == 2 and all(Path(word).is_absolute() and Path(word).is_file() for word in words)


def test_a_trial_that_takes_too_long_is_a_result(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, [SLOW], limits={"seconds": 1})
    assert sweep.run() is None
    assert [(row.cause, row.message) for row in sweep.outcomes] == [("timeout", "stopped after limits.seconds, 1")]


def test_a_second_call_repeats_nothing_until_it_is_asked_to(tmp_path: Path) -> None:
    assert make_sweep(tmp_path, [WORKS, CRASHES]).run()
    assert make_sweep(tmp_path, [WORKS, CRASHES, 7]).run()
    assert sorted(starts(tmp_path)) == [WORKS, CRASHES, 7]
    assert make_sweep(tmp_path, [WORKS, CRASHES], again=["crash"]).run()
    assert sorted(starts(tmp_path)) == [WORKS, CRASHES, CRASHES, 7]


@pytest.mark.parametrize("change", [{"overrides": ["seed=1"]}, {"limits": {"seconds": 31}}, {"epoch_clips": 5}])
def test_what_was_measured_otherwise_is_measured_again(tmp_path: Path, change: dict[str, Any]) -> None:
    make_sweep(tmp_path, [WORKS]).run()
    make_sweep(tmp_path, [WORKS], **change).run()
    assert starts(tmp_path) == [WORKS, WORKS]


def test_a_line_cut_short_by_a_kill_is_measured_again(tmp_path: Path) -> None:
    make_sweep(tmp_path, [WORKS, 7]).run()
    results = tmp_path / "results" / "results.jsonl"
    results.write_text(results.read_text()[:-20])
    make_sweep(tmp_path, [WORKS, 7]).run()
    assert len(read_json_lines(results)) == 2 and len(starts(tmp_path)) == 3
    assert whole_lines(results) == read_json_lines(results)


def test_stopping_ends_what_runs_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(tmp_path, [WORKS, SLOW], parallel=2)
    record = sweep._record

    def record_and_stop(outcome: Any) -> None:
        record(outcome)
        while not any(SLOW == started for started in starts(tmp_path)):
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_record", record_and_stop)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert time.monotonic() - began < 20
    assert [row["cause"] for row in read_json_lines(sweep.results)] == ["ok"]
    assert not [each for each in psutil.Process().children(recursive=True) if str(tmp_path) in " ".join(each.cmdline())]


def test_halving_measures_only_survivors_at_length(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path, [10, 20, 30, CRASHES], search="halving", rungs=[["seed=1"], ["seed=2"]], keep_share=0.5
    )
    winner = sweep.run()
    assert winner and (winner.rung, winner.clips_per_second_per_device) == (1, 30.0)
    assert [(row.rung, row.clips_per_second_per_device) for row in sweep.outcomes if row.rung] == [(1, 30.0), (1, 20.0)]


def test_listed_trials_are_always_tried_and_variables_reach_the_process(tmp_path: Path) -> None:
    listed = {SETTING: 9, "environment.NCCL_DEBUG": "INFO"}
    sweep = make_sweep(tmp_path, range(10, 20), max_trials=2, trials=[listed], environment={"OMP_NUM_THREADS": "1"})
    assert len(sweep.trials) == 3
    trial = list(sweep.trials.values())[-1]
    assert sweep.runner.environment(trial) == {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO"}
    assert trial.overrides() == [f"{SETTING}=9"]


def test_settings_that_go_together_are_one_axis() -> None:
    axes = {"together.batch": [{"a[0].b": 1, "a[1].b": 2}, {"a[0].b": 3, "a[1].b": 4}], "c": [0]}
    first, second = enumerate_trials(axes, [])
    assert first.overrides() == ["a[0].b=1", "a[1].b=2", "c=0"]
    assert second.label() == "a[0].b=3 a[1].b=4 c=0"


def test_a_key_that_no_experiment_has_ends_the_sweep_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optimizer.warm"):
        make_sweep(tmp_path, [1], axes={"optimizer.warm_steps": [1, 2]})


def smi(monkeypatch: pytest.MonkeyPatch, rows: list[str], visible: str | None) -> None:
    """nvidia-smi as it would answer."""
    monkeypatch.setattr("shutil.which", lambda name: name)
    answer = subprocess.CompletedProcess([], 0, stdout="\n".join(rows) + "\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("visible", "free"),
    [(None, ["0", "2"]), ("0", ["0"]), ("GPU-cc", ["2"]), ("GPU-aa11, GPU-cc33", ["0", "2"]), ("", []), ("-1", [])],
)
def test_free_gpus_are_found_by_index_and_uuid(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, free: list[str]
) -> None:
    smi(monkeypatch, ["0, GPU-aa11, 80000, 79000", "1, GPU-bb22, 80000, 100", "2, GPU-cc33, 80000, 80000"], visible)
    assert free_gpus() == free


@pytest.mark.parametrize(
    ("visible", "message"), [("1", "^GPUs: got 1 that are all in use"), ("7", "^CUDA_VISIBLE_DEVICES: got '7'")]
)
def test_busy_gpus_are_not_taken_for_none(monkeypatch: pytest.MonkeyPatch, visible: str, message: str) -> None:
    smi(monkeypatch, ["0, GPU-aa11, 80000, 79000", "1, GPU-bb22, 80000, 100"], visible)
    with pytest.raises(UserError, match=message):
        free_gpus()


def test_too_few_free_gpus_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frozen_fast.sweep.devices.free_gpus", lambda: ["0", "2", "3"])
    assert device_groups(0, 1) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "2", "3")]
    assert device_groups(1, 2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}]
    with pytest.raises(UserError, match="devices_per_trial: got 4; allowed: at most 3"):
        device_groups(0, 4)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_results_go_to_wandb_when_it_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    sent: list[tuple[dict[str, Any], int]] = []
    original = wandb.Run.log

    def log(self: Any, data: dict[str, Any], step: int) -> None:
        sent.append((data, step))
        original(self, data, step=step)

    monkeypatch.setattr(wandb.Run, "log", log)
    tracking = {"trackers": ["wandb"], "wandb_mode": "offline", "project": "mine"}
    sweep = make_sweep(tmp_path, [WORKS, CRASHES], tracking=tracking)
    sweep.run()
    assert [step for _, step in sent] == [1, 2]
    rows = {row[f"settings/{SETTING}"]: row for row, _ in sent}
    assert (rows[WORKS]["cause"], rows[WORKS]["clips_per_second_per_device"]) == ("ok", 1.0)
    assert rows[CRASHES]["message"] == "RuntimeError: of its own"
    assert list((tmp_path / "results" / "wandb").glob("offline-run-*/*.wandb"))


def dry_sweep(name: str) -> Sweep:
    return Sweep(
        read_sweep(REPOSITORY / "configs" / "sweeps" / name),
        folder=Path("nowhere"),
        train_script=REPOSITORY / "train.py",
    )


@pytest.mark.parametrize("name", SWEEPS)
def test_every_trial_of_a_shipped_sweep_is_an_experiment(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = dry_sweep(name)
    for trial in sweep.trials.values():
        for rung in sweep.rungs:
            load_config(sweep.config.experiment, sweep.runner.overrides(trial, rung))
        load_config(sweep.config.experiment, trial.overrides())  # the winner that it may be
    sweep.print_commands(sys.stdout)
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == len(sweep.trials) >= 6
    assert all("accelerate.commands.launch --config_file" in line and "train.py --config" in line for line in commands)


@pytest.mark.parametrize(("name", "product", "tried"), [("gpu_1.yaml", 864, 41), ("gpu_8.yaml", 3024, 61)])
def test_the_gpu_sweeps_cover_what_the_docs_name(name: str, product: int, tried: int) -> None:
    sweep = dry_sweep(name)
    assert len(sweep.trials) == tried
    axes = dict(sweep.config.axes)
    assert {
        "accelerate",
        "together.batch",
        "curriculum.gradient_accumulation_steps",
        "model.video.checkpointed_blocks",
        "model.video.attention",
        "training.compile",
        "data.decode.workers",
    } == set(axes)
    assert any("offload" in path for path in axes["accelerate"]) and any("zero3" in path for path in axes["accelerate"])
    whole = dataclasses.replace(sweep.config, max_trials=0, trials=())
    everything = Sweep(whole, folder=Path("nowhere"), train_script=Path("train.py")).trials
    assert len(everything) == product
