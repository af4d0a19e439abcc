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
        assert "_sleep_at_the_step" in text and "next_batch" in text, text
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
