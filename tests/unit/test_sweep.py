"""Sweep: which trials there are, how a process ends, what a run folder says, and the order of the table."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from frozen_fast.errors import UserError
from frozen_fast.sweep.outcome import Outcome, classify, read_figures, telling_line
from frozen_fast.sweep.process import run_limited
from frozen_fast.sweep.ranking import COLUMNS, rank, table_rows
from frozen_fast.sweep.space import Trial, draw_trials, enumerate_trials, survivors
from frozen_fast.sweep.sweep_file import read_sweep


def test_product_and_listed_trials_appear_once_each() -> None:
    axes = {"training.compile": [False, True], "curriculum.gradient_accumulation_steps": [1, 2, 4]}
    listed = [{"training.compile": True, "curriculum.gradient_accumulation_steps": 4}, {"accelerate": "zero1.yaml"}]
    trials = enumerate_trials(axes, listed)
    assert len(trials) == 2 * 3 + 1
    assert len({trial.name for trial in trials}) == len(trials)
    assert [trial.accelerate for trial in trials].count("zero1.yaml") == 1


def test_a_trials_name_does_not_depend_on_the_order_of_its_keys() -> None:
    first, second = enumerate_trials({}, [{"a": 1, "b": [2]}])[0], enumerate_trials({}, [{"b": [2], "a": 1}])[0]
    assert first.name == second.name
    assert first.overrides() == ["a=1", "b=[2]"]


def test_a_draw_is_a_part_without_repeats_and_repeats_itself() -> None:
    trials = enumerate_trials({"a": list(range(20))}, [])
    drawn = draw_trials(trials, 7, seed=3)
    assert drawn == draw_trials(trials, 7, seed=3)
    assert len(drawn) == len(set(drawn)) == 7
    assert set(drawn) < set(trials)
    assert draw_trials(trials, 0, seed=3) == trials


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({"a": 1.0, "b": 3.0, "c": 2.0, "d": None}, ["b", "c"]),
        ({"a": None, "b": None}, []),
        ({"a": 0.5}, ["a"]),
    ],
)
def test_halving_keeps_the_fastest_and_never_a_failure(scores: dict[str, float | None], kept: list[str]) -> None:
    assert survivors(scores, 0.5) == kept


@pytest.mark.parametrize(
    ("exit_code", "output", "flags", "cause"),
    [
        (0, "", {}, "ok"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", {}, "out_of_memory"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", {}, "out_of_memory"),
        (2, "error: out of memory at step 1 (stage 0, 4 frames, source videos): got 24 clips", {}, "out_of_memory"),
        (-9, "", {}, "out_of_memory"),
        (-15, "", {"timed_out": True}, "timeout"),
        (-15, "", {"over_memory": True}, "out_of_memory"),
        (2, "error: loss: got nan at step 3; allowed: finite", {}, "nan"),
        (2, "error: model.video.size: got 'x'", {}, "refused"),
        (1, "Segmentation fault", {}, "crash"),
    ],
)
def test_causes(exit_code: int, output: str, flags: dict[str, bool], cause: str) -> None:
    assert classify(exit_code, output, **{"timed_out": False, "over_memory": False, **flags}) == cause


def test_the_telling_line_is_the_last_error() -> None:
    assert telling_line("start\nValueError: bad thing\n  cleaning up\n") == "ValueError: bad thing"
    launcher = "subprocess.CalledProcessError: Command 'train.py' returned non-zero exit status 2."
    assert telling_line(f"error: seed: got x\nTraceback\n{launcher}\n") == "error: seed: got x"
    assert telling_line(f"start\n{launcher}\n") == launcher
    assert telling_line("only words\n") == "only words"
    assert telling_line("") == ""


def run(code: str, folder: Path, *, seconds: float = 30.0, memory_bytes: int | None = None):
    return run_limited(
        [sys.executable, "-c", code],
        folder=folder,
        environment={},
        log=folder / "out.log",
        seconds=seconds,
        memory_bytes=memory_bytes,
    )


def test_a_process_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    result = run(code, tmp_path, seconds=2.0)
    assert result.timed_out and result.exit_code != 0 and result.seconds < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child outlived its session")


def test_a_process_past_its_memory_is_stopped(tmp_path: Path) -> None:
    code = "import time\nblock = bytearray(400 * 2**20)\ntime.sleep(30)\n"
    result = run(code, tmp_path, memory_bytes=200 * 2**20)
    assert result.over_memory and not result.timed_out and result.peak_resident_bytes > 200 * 2**20


def test_a_process_that_ends_by_itself_keeps_its_code_and_output(tmp_path: Path) -> None:
    result = run("import sys; print('words'); sys.exit(3)", tmp_path)
    assert (result.exit_code, result.timed_out, result.over_memory) == (3, False, False)
    assert (tmp_path / "out.log").read_text() == "words\n"


def stage(**changes: object) -> dict[str, object]:
    row = {
        "clips": 100,
        "clips_per_second": 50.0,
        "stall_share": 0.1,
        "num_devices": 2,
        "peak_memory_bytes": 7,
        "mfu_datasheet": None,
    }
    return {**row, **changes}


def test_figures_weigh_stages_by_their_clips(tmp_path: Path) -> None:
    stages = [stage(), stage(clips=300, clips_per_second=10.0, stall_share=0.5, peak_memory_bytes=9, mfu_datasheet=0.4)]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    figures = read_figures(tmp_path, epoch_clips=4000)
    seconds = 100 / 50 + 300 / 10
    assert figures["clips_per_second_per_device"] == pytest.approx(400 / seconds / 2)
    assert figures["gpu_hours_per_epoch"] == pytest.approx(4000 * seconds / 400 * 2 / 3600)
    assert figures["stall_share"] == pytest.approx((0.1 * 2 + 0.5 * 30) / seconds)
    assert (figures["peak_memory_bytes"], figures["mfu_datasheet"]) == (9, 0.4)


def test_a_run_without_measured_steps_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps([stage(clips_per_second=None)]))
    with pytest.raises(ValueError, match="no measured steps"):
        read_figures(tmp_path, epoch_clips=1)


def test_the_table_puts_working_trials_first_and_failures_with_their_cause_last() -> None:
    slow, fast, broken = enumerate_trials({"a": [1, 2, 3]}, [])
    outcomes = [
        Outcome(trial=broken.name, rung=0, cause="crash", message="Segmentation fault | core"),
        Outcome(trial=slow.name, rung=0, cause="ok", clips_per_second_per_device=1.0),
        Outcome(trial=fast.name, rung=0, cause="ok", clips_per_second_per_device=2.0),
    ]
    trials: dict[str, Trial] = {trial.name: trial for trial in (slow, fast, broken)}
    assert [row.trial for row in rank(outcomes)] == [fast.name, slow.name, broken.name]
    rows = table_rows(outcomes, trials)
    assert [row[0] for row in rows] == ["1", "2", "-"]
    assert rows[2][COLUMNS.index("result")].startswith("crash: Segmentation fault")
    assert rows[0][COLUMNS.index("settings")] == "a=2"


def test_a_later_rung_stands_above_an_earlier_one() -> None:
    outcomes = [
        Outcome(trial="x", rung=0, cause="ok", clips_per_second_per_device=9.0),
        Outcome(trial="y", rung=0, cause="ok", clips_per_second_per_device=5.0),
        Outcome(trial="y", rung=1, cause="ok", clips_per_second_per_device=4.0),
    ]
    assert [row.trial for row in rank(outcomes)] == ["y", "x"]


def write_sweep(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_sweep_file_is_read_with_its_mappings(tmp_path: Path) -> None:
    text = """
experiment: base.yaml
environment: {DS_ACCELERATOR: cpu}
axes: {training.compile: [false, true], "curriculum.stages[0].global_batch_size": [8, 16]}
trials: [{accelerate: zero1.yaml, training.precision: fp32}]
"""
    (tmp_path / "zero1.yaml").touch()
    config = read_sweep(write_sweep(tmp_path, text), ["limits.memory_gib=2.5"])
    assert dict(config.axes) == {"training.compile": (False, True), "curriculum.stages[0].global_batch_size": (8, 16)}
    assert dict(config.trials[0]) == {"accelerate": str(tmp_path / "zero1.yaml"), "training.precision": "fp32"}
    assert config.experiment == str(tmp_path / "base.yaml")
    assert dict(config.environment) == {"DS_ACCELERATOR": "cpu"}
    assert config.limits.memory_gib == 2.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {a: [1]}", "experiment: got nothing"),
        ("experiment: x.yaml", "axes: got nothing"),
        ("experiment: x.yaml\naxes: {a: []}", "axes.a: got an empty list"),
        ("experiment: x.yaml\naxes: {a: [1]}\nsearch: halving", "rungs: got nothing"),
        ("experiment: x.yaml\naxes: {a: [1]}\nlimit: {}", "did you mean limits"),
        ("experiment: x.yaml\naxes: {a: [1]}\nlimits: {seconds: 0}", "limits.seconds: got 0"),
        ("- 1", "allowed: a mapping"),
        ("experiment: x.yaml\naxes: {accelerate: [no.yaml]}", r"accelerate: got .*no\.yaml; allowed: an Accelerate"),
    ],
)
def test_a_wrong_sweep_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sweep(write_sweep(tmp_path, text))


def test_paths_of_the_file_are_relative_to_it_and_those_of_the_command_line_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("a.yaml", "b.yaml", "here/c.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(here)
    text = "experiment: base.yaml\naccelerate: a.yaml\naxes: {accelerate: [b.yaml]}\ntrials: [{accelerate: a.yaml}]"
    path = write_sweep(tmp_path, text)
    config = read_sweep(path, ["experiment=own.yaml", "trials[1]={accelerate: c.yaml}", "axes={seed: [1]}"])
    assert (config.experiment, config.accelerate) == (str(here / "own.yaml"), str(tmp_path / "a.yaml"))
    assert dict(config.axes) == {"accelerate": (str(tmp_path / "b.yaml"),), "seed": (1,)}
    assert [dict(trial)["accelerate"] for trial in config.trials] == [str(tmp_path / "a.yaml"), str(here / "c.yaml")]
