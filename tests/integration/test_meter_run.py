"""Where a stage's time and energy went in a run that was stopped and went on, against clocks of the test's own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from frozen_fast.parallel.model_state import ModelState
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training import checkpoint_keeper as keeper_module
from frozen_fast.training import engine as engine_module
from frozen_fast.training import run as run_module
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import train
from support.runs import make_data, read_json, tiny_config

pytestmark = pytest.mark.integration

PARTS = ("training", "stall", "warmup", "evaluation", "checkpoint", "other")
SAVING_SECONDS = 0.3
WATTS = 50.0


class Watch:
    """Counts the time from the beginning of stages to the last word about them, without the meter's help."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = self._ended = 0.0

    def begin(self) -> None:
        self._began = self._ended = time.perf_counter()

    def end(self) -> None:
        self._ended = time.perf_counter()

    def close(self) -> None:
        self.seconds += self._ended - self._began


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A watch on every stage of runs in this test; saving takes a while, and the device 50 watts."""
    made = Watch()
    stage_meter, write_state, weights = engine_module.StageMeter, keeper_module.write_state, ModelState.weights
    put_stage_row = RunFolder.put_stage_row

    def begin(*arguments: Any, **options: Any) -> Any:
        made.begin()
        return stage_meter(*arguments, **options)

    def write(*arguments: Any) -> None:
        made.end()
        write_state(*arguments)

    def put(*arguments: Any) -> None:
        made.end()
        put_stage_row(*arguments)

    def slow_weights(self: ModelState) -> dict[str, torch.Tensor]:
        time.sleep(SAVING_SECONDS)
        return weights(self)

    monkeypatch.setattr(run_module, "write_report", lambda folder: (folder / "report.md", folder / "report.html"))
    monkeypatch.setattr(engine_module, "StageMeter", begin)
    monkeypatch.setattr(keeper_module, "write_state", write)
    monkeypatch.setattr(RunFolder, "put_stage_row", put)
    monkeypatch.setattr(ModelState, "weights", slow_weights)
    device = SimpleNamespace(uuid="GPU-test", joules=lambda: WATTS * time.perf_counter())
    monkeypatch.setattr(run_module, "energy_meter", lambda _: (device, "a made-up counter"))
    yield made


def test_time_and_energy_of_a_stopped_run_add_up(watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 4 of 8: both parts' training, stall, warm-up, evaluation and checkpoints are counted."""
    files = make_data(tmp_path / "data")
    config = tiny_config(
        files,
        tmp_path / "run",
        curriculum={"stages": [{"frames": 2, "global_batch_size": 4, "steps": 8}]},
        evaluation={"every": "epoch", "sources": [{"name": "held_out", "path": str(files["videos"])}]},
        checkpoints={"every_steps": 0, "asynchronous": False},  # the watch ends with what the writer's thread writes
    )
    with monkeypatch.context() as patch:
        original = Journal.add

        def add(self: Journal, result: Any, meter: Any) -> None:
            original(self, result, meter)
            if result.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Journal, "add", add)
        assert train(config) == 75
    watch.close()
    assert train(config, resume="auto") == 0
    watch.close()
    (row,) = read_json(tmp_path / "run" / "stages.json")
    parts = {part: row[f"{part}_seconds"] for part in PARTS}
    assert sum(parts.values()) == pytest.approx(row["seconds"], rel=0.01)
    assert row["seconds"] == pytest.approx(watch.seconds, rel=0.01)
    assert all(parts[part] > 0 for part in PARTS)
    assert parts["checkpoint"] >= 2 * SAVING_SECONDS, "the checkpoint at the stop and that at the end"
    assert row["joules"] == pytest.approx(WATTS * watch.seconds, rel=0.02)
    assert [row["step"] for row in read_json(tmp_path / "run" / "metrics.json")["evaluations"]] == [6, 8]
    assert read_json(tmp_path / "run" / "environment.json")["energy"] == "a made-up counter"
