"""A signal to the whole process group, and a decoder that never returns: the run ends soon, with the right code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import load_config
from frozen_fast.training.run import train
from support.runs import REPOSITORY, environment, losses, make_data, read_json, tiny_mapping, without_reports

pytestmark = pytest.mark.integration

PATIENCE_SECONDS = 180


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def write_config(data: dict[str, Path], folder: Path, **decode: object) -> Path:
    """A run of six steps at one frame, each of two forward passes."""
    mapping = tiny_mapping(
        data,
        folder / "run",
        data={
            "sources": [{"name": "videos", "path": str(data["videos"])}],
            "decode": {"backend": "pyav", "threads": 1, **decode},
        },
        curriculum={
            "stages": [{"frames": 1, "global_batch_size": 4, "steps": 6}],
            "gradient_accumulation_steps": 2,
        },
    )
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return path


def start(config: Path, **variables: str) -> subprocess.Popen[str]:
    """A training process that leads a process group of its own."""
    command = [sys.executable, str(REPOSITORY / "tests" / "support" / "stuck_train.py"), "--config", str(config)]
    return subprocess.Popen(
        command, env=environment(**variables), text=True, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_json_lines(folder / "steps.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_the_rest_is_bit_identical(
    data: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The loader processes die of it while the run waits for them: no batch comes any more."""
    config = write_config(data, tmp_path, workers=1, prefetch_batches=4)
    run = tmp_path / "run"
    process = start(config, STUCK_AT_STEP="4")
    wait_for_steps(process, run, 3)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 75, errors
    status = read_json(run / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 3)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert train(load_config(config, ["data.decode.workers=0"]), resume="auto") == 0
    straight = tmp_path / "straight"
    assert train(load_config(config, ["data.decode.workers=0", f"run_folder={straight}"])) == 0
    assert losses(run) == losses(straight)
    assert read_json(run / "stages.json")[0]["clips"] == read_json(straight / "stages.json")[0]["clips"]


def test_a_decoder_that_never_returns_keeps_no_failed_run_alive(data: dict[str, Path], tmp_path: Path) -> None:
    """Python waits for a thread pool's threads at exit; a run that has failed must leave, and say why."""
    config = write_config(data, tmp_path, threads=2, read_timeout_seconds=8)
    process = start(config, STUCK_AT_STEP="2", STUCK_IN="decode")
    errors = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert "data.decode.read_timeout_seconds: waited for the batch of step 2" in last
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 2
