"""The launchers' dry runs: the exact command, and one line with exit code 2 for a mistake."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "configs/pretrain/webvid_1_4_8.yaml"


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env={
            **clean,
            "FROZEN_FAST_PYTHON": sys.executable,
            "FROZEN_FAST_VENV": "/nowhere",
            "FROZEN_FAST_DOCTOR": "0",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def without_gpus(tmp_path: Path, count: int) -> str:
    """A PATH on which nvidia-smi reports so many GPUs."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\n" + "".join(f"echo {index}\n" for index in range(count)))
    fake.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("gpus", "config", "processes"),
    [(0, "cpu.yaml", None), (1, "gpu_1.yaml", None), (4, "gpu_8.yaml", "4"), (8, "gpu_8.yaml", "8")],
)
def test_single_node_takes_the_config_of_its_gpus(
    tmp_path: Path, gpus: int, config: str, processes: str | None
) -> None:
    result = call("single_node.sh", "--dry-run", EXPERIMENT, "seed=3", "name=a b", PATH=without_gpus(tmp_path, gpus))
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert Path(words[words.index("--config_file") + 1]).name == config
    assert Path(words[words.index("--config_file") + 1]).exists()
    assert ("--num_processes" in words) == (processes is not None)
    if processes:
        assert words[words.index("--num_processes") + 1] == processes
    assert words[-6:] == ["--config", EXPERIMENT, "--resume", "auto", "seed=3", "name=a b"]


def test_multi_node_passes_the_rendezvous_on() -> None:
    result = call(
        "multi_node.sh",
        "--dry-run",
        "--processes",
        "16",
        EXPERIMENT,
        NODES="2",
        NODE_RANK="1",
        RENDEZVOUS="node0:29500",
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    pairs = dict(zip(words, words[1:], strict=False))
    assert (pairs["--num_machines"], pairs["--machine_rank"], pairs["--num_processes"]) == ("2", "1", "16")
    assert (pairs["--main_process_ip"], pairs["--main_process_port"]) == ("node0", "29500")
    assert pairs["--rdzv_backend"] == "c10d"


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("single_node.sh", ["nowhere.yaml"], {}, "experiment: got nowhere.yaml"),
        ("single_node.sh", [], {}, "experiment: got nothing"),
        ("single_node.sh", ["--fast", EXPERIMENT], {}, "got the option --fast"),
        ("single_node.sh", ["--processes", "two", EXPERIMENT], {}, "--processes: got two"),
        ("single_node.sh", ["--accelerate", "nowhere.yaml", EXPERIMENT], {}, "--accelerate: got nowhere.yaml"),
        (
            "multi_node.sh",
            ["--processes", "3", EXPERIMENT],
            {"NODES": "2", "NODE_RANK": "0", "RENDEZVOUS": "a:1"},
            "multiples of NODES=2",
        ),
        (
            "multi_node.sh",
            ["--processes", "4", EXPERIMENT],
            {"NODES": "2", "NODE_RANK": "2", "RENDEZVOUS": "a:1"},
            "NODE_RANK: got 2; allowed: 0 to 1",
        ),
        (
            "multi_node.sh",
            ["--processes", "4", EXPERIMENT],
            {"NODES": "2", "NODE_RANK": "0", "RENDEZVOUS": "a"},
            "RENDEZVOUS: got a; allowed: HOST:PORT",
        ),
        ("slurm.sh", [], {}, "experiment: got nothing"),
        ("multi_node.sh", [EXPERIMENT], {}, "multi_node.sh: NODES: got nothing; allowed: the number of machines"),
        ("multi_node.sh", [EXPERIMENT], {"NODES": "2"}, "multi_node.sh: NODE_RANK: got nothing; allowed: 0 to"),
        ("single_node.sh", ["--restarts", "x", EXPERIMENT], {}, "--restarts: got x; allowed: a whole number"),
        ("single_node.sh", ["--dry-run", EXPERIMENT, "seed=-1"], {}, "seed: got -1"),
        (
            "multi_node.sh",
            ["--dry-run", "--processes", "4", EXPERIMENT, "sede=1"],
            {"NODES": "2", "NODE_RANK": "0", "RENDEZVOUS": "a:1"},
            "sede",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    script: str, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    result = call(script, *arguments, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_slurm_prints_its_step_and_what_a_node_runs() -> None:
    result = call("slurm.sh", EXPERIMENT, "seed=3", DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    step, node = (shlex.split(line) for line in result.stdout.strip().splitlines())
    assert step[0] == "srun" and EXPERIMENT in step
    assert node[node.index("--num_processes") + 1] == "16"


def fake_command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("status", "requeued"),
    [
        ({"state": "stopped"}, True),
        ({"state": "failed", "exit_code": 2}, False),  # a mistake, which a restart repeats
        ({"state": "failed", "exit_code": 1, "checkpoint": 500}, True),
        ({"state": "running", "checkpoint": 500}, True),  # killed without a word
    ],
)
def test_slurm_puts_a_run_back_that_was_stopped_or_lost_and_no_mistake(
    tmp_path: Path, status: dict[str, object], requeued: bool
) -> None:
    """srun and scontrol are stand-ins; srun plays a run that leaves its state and torchrun's exit code 1."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    fake_command(tmp_path, "srun", f"sleep 1.1; echo '{json.dumps(status)}' > {run_folder}/status.json; exit 1")
    fake_command(tmp_path, "scontrol", f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued; echo node7')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = call(
        "slurm.sh",
        EXPERIMENT,
        f"run_folder={run_folder}",
        PATH=path,
        SLURM_JOB_ID="41",
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    )
    assert result.returncode == (0 if requeued else 1), result.stderr
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize(("launcher_code", "own_code", "code"), [(0, None, 0), (1, 2, 2), (1, 75, 75), (1, None, 1)])
def test_single_node_returns_the_runs_own_code(
    tmp_path: Path, launcher_code: int, own_code: int | None, code: int
) -> None:
    """A stand-in for python plays Accelerate's launcher, which returns 1 whatever train.py returned."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    status = "" if own_code is None else json.dumps({"state": "failed", "exit_code": own_code})
    launcher = f"sleep 1.1; [ -z '{status}' ] || echo '{status}' > {run_folder}/status.json; exit {launcher_code}"
    fake_command(tmp_path, "python", f'if [ "$1" = -m ]; then {launcher}; else exec {sys.executable} "$@"; fi')
    result = call(
        "single_node.sh",
        EXPERIMENT,
        f"run_folder={run_folder}",
        FROZEN_FAST_PYTHON=str(tmp_path / "python"),
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    )
    assert result.returncode == code, result.stderr


def test_single_node_checks_the_config_before_it_starts_anything() -> None:
    result = call("single_node.sh", EXPERIMENT, "optimizer.learning_rate=-1")
    assert result.returncode == 2
    assert "optimizer.learning_rate: got -1" in result.stderr


@pytest.mark.slow
def test_a_stop_reaches_train_and_waits_for_its_checkpoint(tmp_path: Path) -> None:
    """The launcher dies of TERM at once, as Accelerate's does; its child needs a second to save."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (tmp_path / "stopped.json").write_text(json.dumps({"state": "stopped", "exit_code": 75}))
    saving = f"sleep 1; cat {tmp_path}/stopped.json > {run_folder}/status.json; exit 75"
    fake_command(tmp_path, "trainer", f"trap '{saving}' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done")
    launcher = f"{tmp_path}/trainer & wait"
    fake_command(tmp_path, "python", f'if [ "$1" = -m ]; then {launcher}; else exec {sys.executable} "$@"; fi')
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    process = subprocess.Popen(
        ["bash", "launch/single_node.sh", EXPERIMENT, f"run_folder={run_folder}"],
        cwd=ROOT,
        env={
            **os.environ,
            "FROZEN_FAST_PYTHON": str(tmp_path / "python"),
            "FROZEN_FAST_VENV": "/nowhere",
            "FROZEN_FAST_DOCTOR": "0",
            "PYTHONPATH": paths,
        },
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline, "train did not start"
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 75
    assert json.loads((run_folder / "status.json").read_text())["state"] == "stopped"


def test_slurm_takes_the_environment_of_the_checkout(tmp_path: Path) -> None:
    """The job's shell has no activated environment, where python3 may lack every package."""
    run_folder = tmp_path / "run"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    fake_command(tmp_path / "venv" / "bin", "python", f'exec {sys.executable} "$@"')
    fake_command(tmp_path, "no_python", "exit 9")
    stopped = '{"state": "stopped"}'
    fake_command(
        tmp_path, "srun", f"sleep 1.1; mkdir {run_folder}; echo '{stopped}' > {run_folder}/status.json; exit 1"
    )
    fake_command(tmp_path, "scontrol", f'[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued; echo node7')
    result = call(
        "slurm.sh",
        EXPERIMENT,
        f"run_folder={run_folder}",
        SLURM_JOB_ID="41",
        FROZEN_FAST_PYTHON="no_python",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        FROZEN_FAST_VENV=str(tmp_path / "venv"),
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "requeued").exists()


def test_starts_without_a_new_checkpoint_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from run_state import may_restart

    def ended_at(checkpoint: int | None) -> bool:
        status = {"state": "failed", "exit_code": 1, "checkpoint": checkpoint}
        (tmp_path / "status.json").write_text(json.dumps(status))
        return may_restart(tmp_path, 3)[0]

    assert [ended_at(step) for step in (None, None, 10, 10, 10, 20, 20, 20, 20)] == [True] * 8 + [False]
    (tmp_path / "restarts.json").unlink()
    assert [ended_at(None) for _ in range(3)] == [True, True, False]


def test_single_node_restarts_a_run_that_crashed_until_it_is_done(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    crash = json.dumps({"state": "failed", "exit_code": 1, "checkpoint": 7})
    launcher = (
        f"sleep 1.1; echo x >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) = 3 ] && exit 0; "
        f"echo '{crash}' > {run_folder}/status.json; exit 1"
    )
    fake_command(tmp_path, "python", f'if [ "$1" = -m ]; then {launcher}; else exec {sys.executable} "$@"; fi')
    result = call(
        "single_node.sh",
        "--restarts",
        "5",
        EXPERIMENT,
        f"run_folder={run_folder}",
        FROZEN_FAST_PYTHON=str(tmp_path / "python"),
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "starts").read_text() == "x\n" * 3
    assert "restarting from checkpoint 7" in result.stderr


@pytest.mark.slow
def test_a_launcher_asks_the_doctor_before_it_starts(tmp_path: Path) -> None:
    """Two processes are wanted and one would start."""
    result = call(
        "single_node.sh",
        EXPERIMENT,
        f"run_folder={tmp_path / 'run'}",
        "training.expected_world_size=2",
        FROZEN_FAST_DOCTOR="1",
        PATH=without_gpus(tmp_path, 0),
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    )
    assert result.returncode == 2
    assert "fails    world size: 1 process(es), training.expected_world_size=2. To do: start that" in result.stderr
    assert not (tmp_path / "run").exists()
