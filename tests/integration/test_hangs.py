"""Runs that hang: the stacks of every rank, a message, a non-zero exit, within the limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import dump_yaml
from support.runs import environment, make_data, read_json, tiny_config, torchrun

pytestmark = pytest.mark.integration

STUCK = str(Path(__file__).resolve().parents[1] / "support" / "stuck_train.py")
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def write_config(data: dict[str, Path], folder: Path, **decode: object) -> str:
    config = tiny_config(
        data,
        folder / "run",
        data={
            "sources": [{"name": "videos", "path": str(data["videos"])}],
            "decode": {"backend": "pyav", "threads": 1, **decode},
        },
        watchdog={"step_minutes": 0.1, "first_step_minutes": 2.0},
    )
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return str(folder / "config.yaml")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hang_ends_the_run_with_every_ranks_stacks(data: dict[str, Path], tmp_path: Path, processes: int) -> None:
    config = write_config(data, tmp_path, read_timeout_seconds=3600)
    command = [STUCK, "--config", config]
    launch = [sys.executable, *command] if processes == 1 else torchrun(*command, processes=processes)
    done = subprocess.run(
        launch, env=environment(STUCK_AT_STEP="3"), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 1, done.stderr[-2000:]
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed" and status["message"].startswith("hung: phase step took longer than 6 s")
    for rank in range(processes):
        text = (tmp_path / "run" / "hangs" / f"rank_{rank}.txt").read_text(encoding="utf-8")
        caller = "next_batch" if processes == 1 else "read_ahead"  # several ranks read while the device computes
        assert "_sleep_at_the_step" in text and caller in text, text
        assert "loader: the batch of step 3, pass 0, source 'videos'" in text
    assert [row["kind"] for row in read_json_lines(tmp_path / "run" / "events.jsonl")] == ["hang"]


def parent_of(pid: int) -> int:
    """A process's parent, by /proc; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    """Processes below one, by /proc."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    own = [number for number in numbers if parent_of(number) == pid]
    return own + [child for number in own for child in children(number)]


def test_a_stopped_loader_process_is_an_error_after_the_time_limit(data: dict[str, Path], tmp_path: Path) -> None:
    """A stopped process does not hear SIGTERM: the run must not wait for it at its end."""
    config = write_config(data, tmp_path, workers=1, prefetch_batches=1, read_timeout_seconds=4)
    command = [sys.executable, STUCK, "--config", config, "curriculum.stages[0].steps=500", "watchdog.step_minutes=0"]
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, env=environment(STUCK_AT_STEP="100000"), stderr=errors, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(read_json_lines(tmp_path / "run" / "steps.jsonl")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        loaders = [pid for pid in children(process.pid) if parent_of(pid) != process.pid]  # the fork server's
        assert loaders
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)
        assert process.wait(timeout=90) == 2
        told = (tmp_path / "errors.txt").read_text().strip().splitlines()[-1]
        assert "data.decode.read_timeout_seconds: waited for the batch of step" in told
    finally:
        for pid in [process.pid, *children(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_a_second_term_ends_a_run_that_cannot_finish_its_step(data: dict[str, Path], tmp_path: Path) -> None:
    config = write_config(data, tmp_path, read_timeout_seconds=3600)
    command = [sys.executable, STUCK, "--config", config, "watchdog.step_minutes=0"]
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, env=environment(STUCK_AT_STEP="3"), stderr=errors)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(read_json_lines(tmp_path / "run" / "steps.jsonl")) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        time.sleep(4)
        assert process.poll() is None, "the step was not stuck"
        process.terminate()
        assert process.wait(timeout=60) == 130
        assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 130
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_run_with_every_ranks_stacks(data: dict[str, Path], tmp_path: Path, frozen: int) -> None:
    """One of two ranks is stopped; the other waits for it in a collective."""
    config = write_config(data, tmp_path)
    command = torchrun(STUCK, "--config", config, "curriculum.stages[0].steps=5000")
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, env=environment(STUCK_AT_STEP="100000"), stderr=errors)
    ranks: list[int] = []
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(read_json_lines(tmp_path / "run" / "steps.jsonl")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = [pid for pid in children(process.pid) if parent_of(pid) == process.pid and rank_of(pid) is not None]
        (stopped,) = [pid for pid in ranks if rank_of(pid) == frozen]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        assert process.wait(timeout=90) != 0
        assert time.monotonic() - began < 6 + 30 + 30  # the limit, the promise, and a busy machine
        for rank in range(2):
            text = (tmp_path / "run" / "hangs" / f"rank_{rank}.txt").read_text(encoding="utf-8")
            assert "most recent call first" in text and "engine.py" in text, text
        assert read_json(tmp_path / "run" / "status.json")["state"] == "failed"
    finally:
        for pid in [process.pid, *ranks]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def rank_of(pid: int) -> int | None:
    """The rank that a launcher gave a process; None where it gave none."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [word.removeprefix(b"RANK=") for word in words if word.startswith(b"RANK=")]
    return int(found[0]) if found else None
