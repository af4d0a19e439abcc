"""A real sweep of seven settings on CPU processes, stopped in the middle and resumed, and a training run of its winner.

configs/sweeps/cpu_small.yaml with fewer settings, a smaller text tower and one trial more, whose loss becomes NaN.
"""

from __future__ import annotations

import importlib.util
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from frozen_fast.common.files import read_json_lines
from support.runs import REPOSITORY, environment, make_data, read_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TRIALS = 7
PATIENCE_SECONDS = 300.0
OUT_OF_MEMORY, CRASH, NAN = "stages[1].global_batch_size=512", "GLOO_SOCKET_IFNAME=no_such_if", "learning_rate=1e+30"
WANDB = "offline" if importlib.util.find_spec("wandb") else "off"


def write_experiment(folder: Path) -> Path:
    """The shipped experiment on clips rendered here, with a text tower of two layers and the fewest steps."""
    clips = [sys.executable, str(REPOSITORY / "benchmarks/clips.py"), "render", str(folder), "--small"]
    rendered = subprocess.run(clips, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    changes = {
        "extends": str(REPOSITORY / "configs/benchmarks/sweep_small.yaml"),
        "run_folder": str(folder / "winner_run"),
        "model": {
            "text": {"name": str(make_data(folder / "tower", videos=1, pictures=1)["tower"]), "frozen_layers": 0}
        },
        "data": {"sources": [{"name": "clips", "path": rendered.stdout.strip()}]},
        "curriculum": {
            "stages": [
                {"frames": 1, "global_batch_size": 16, "steps": 3},
                {"frames": 4, "global_batch_size": 8, "steps": 2},
            ]
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(changes), encoding="utf-8")
    return path


class Command:
    """The sweep's command line and where it leaves its results."""

    def __init__(self, experiment: Path, folder: Path) -> None:
        self.folder = folder
        self.words = [
            sys.executable,
            str(REPOSITORY / "launch/sweep.py"),
            str(REPOSITORY / "configs/sweeps/cpu_small.yaml"),
            f"experiment={experiment}",
            f"folder={folder}",
            "parallel=2",
            f"wandb={WANDB}",
            "axes.accelerate=[configs/accelerate/cpu.yaml]",
            # trials: 0 recomputes activations, 1 becomes two processes, 2 runs out of memory, 3 crashes, 4 is NaN
            f"trials[1]={{accelerate: {REPOSITORY / 'configs/accelerate/cpu_2.yaml'}}}",
            f"trials[3].accelerate={REPOSITORY / 'configs/accelerate/cpu_2.yaml'}",
            "trials[4]={optimizer.learning_rate: 1e30}",
        ]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def rows(self) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / "results.jsonl")

    def processes(self) -> list[psutil.Process]:
        """Trials that are running."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder / "trials") in word for word in process.info["cmdline"] or ()):
                found.append(process)
        return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, list[dict[str, Any]], str]:
    """(command, rows that stood there when it was stopped by SIGTERM, output of the second call)."""
    folder = tmp_path_factory.mktemp("sweep")
    command = Command(write_experiment(folder), folder / "results")
    first = command.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(command.rows()) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75, errors
    assert not command.processes()
    done = command.rows()
    assert 2 <= len(done) < TRIALS
    second = command.start()
    output, errors = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 0, errors
    assert f"{len(done)} of {TRIALS} trials are measured already" in errors
    return command, done, output


def test_every_trial_is_a_result_with_its_cause(sweep: tuple[Command, list[dict[str, Any]], str]) -> None:
    command, _, output = sweep
    causes = {row["label"]: (row["cause"], row["message"]) for row in command.rows()}
    assert len(causes) == TRIALS
    failed = {label.removeprefix("accelerate=cpu_2 "): why for label, why in causes.items() if why[0] != "ok"}
    assert {label: cause for label, (cause, _) in failed.items()} == {
        OUT_OF_MEMORY: "out_of_memory",
        CRASH: "crash",
        NAN: "nan",
    }, causes
    assert "limits.memory_gib is 3.25" in failed[OUT_OF_MEMORY][1]
    assert "Unable to find address for: no_such_if" in failed[CRASH][1]
    table = (command.folder / "ranking.md").read_text(encoding="utf-8")
    assert table.strip() == output.strip()
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in lines] == ["| 1", "| 2", "| 3", "| 4", "| -", "| -", "| -"]
    assert all(any(label in line for line in lines) for label in causes)
    speeds = [float(line.split(" | ")[1]) for line in lines[:4]]
    assert speeds == sorted(speeds, reverse=True) and min(speeds) > 0
    assert "<svg" in (command.folder / "speeds.svg").read_text(encoding="utf-8")


def test_a_resumed_sweep_repeats_nothing(sweep: tuple[Command, list[dict[str, Any]], str]) -> None:
    command, done, _ = sweep
    rows = command.rows()
    assert rows[: len(done)] == done
    assert len({row["trial"] for row in rows}) == len(rows) == TRIALS


@pytest.mark.skipif(WANDB == "off", reason="wandb is not installed")
def test_both_calls_belong_to_one_wandb_run(sweep: tuple[Command, list[dict[str, Any]], str]) -> None:
    runs = [path.name.rsplit("-", 1)[-1] for path in (sweep[0].folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1


def test_the_winner_trains(sweep: tuple[Command, list[dict[str, Any]], str]) -> None:
    """With the command at the top of winner.yaml, at the experiment's own length."""
    folder = sweep[0].folder
    line = (folder / "winner.yaml").read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words[: words.index("accelerate")])
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[words.index("launch") + 1 :]]
    assert str(folder / "winner_accelerate.yaml") in command
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder.parent / "winner_run"
    assert read_json(run / "status.json")["state"] == "done"
    assert [row["step"] for row in read_json_lines(run / "steps.jsonl")] == [1, 2, 3, 4, 5]
