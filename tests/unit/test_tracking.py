"""Experiment trackers: several at once, the same run after a resume, nothing secret in the folder."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.config.extensions import trackers
from frozen_fast.errors import UserError
from frozen_fast.records.tracking import TrackedRun, Trackers, TrackerSetUp

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="no wandb")


class Recorder(GeneralTracker):
    """Keeps what it is told; a log of "fail" raises."""

    name = "recorder"
    requires_logging_directory = False
    opened: list[Recorder] = []

    def __init__(self, run: TrackedRun) -> None:
        super().__init__()
        self.run = run
        self.configs: list[dict[str, Any]] = []
        self.rows: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    @property
    def tracker(self) -> Recorder:
        return self

    def start(self) -> None:
        Recorder.opened.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configs.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        if "fail" in values:
            raise ConnectionError("gone")
        self.rows.append((values, step))

    def finish(self) -> None:
        self.finished = True


def record(run: TrackedRun) -> TrackerSetUp:
    return TrackerSetUp(Recorder(run), lambda: "drawn-by-the-service")


def numbers_only(run: TrackedRun) -> TrackerSetUp:
    return TrackerSetUp(Recorder(run), lambda: run.id, takes_text=False)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    names = {"recorder": f"{__name__}:record", "numbers": f"{__name__}:numbers_only"}
    monkeypatch.setattr(trackers, "_built_in", {**trackers._built_in, **names})
    monkeypatch.setattr(Recorder, "opened", [])
    return Recorder.opened


def experiment(*names: str, **tracking: Any) -> ExperimentConfig:
    return config_from_mapping({"name": "e", "seed": 3, "tracking": {"trackers": list(names), **tracking}})


def start(folder: Path, config: ExperimentConfig, step: int | None = None) -> Trackers:
    return Trackers.start(config.tracking, name=config.name, config=config, folder=folder, step=step)


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a test that has set the package's logging up."""
    monkeypatch.setattr(logging.getLogger("frozen_fast"), "propagate", True)


def test_without_trackers_nothing_happens(tmp_path: Path) -> None:
    opened = start(tmp_path / "new", experiment())
    opened.log({"loss": 1.0}, 1)
    opened.close()
    assert not (tmp_path / "new").exists()


def test_every_tracker_gets_the_config_and_the_numbers(tmp_path: Path, recorders: list[Recorder]) -> None:
    opened = start(tmp_path, experiment("recorder", "numbers", project="p"))
    opened.log({"loss": 1.0, "cause": "ok", "norm": None}, 1)
    opened.close()
    first, second = recorders
    assert (first.run.project, first.run.name, first.run.known_id) == ("p", "e", None)
    assert first.configs[0]["seed"] == 3 and first.configs[0]["curriculum.stages.0.frames"] == 1
    assert all(isinstance(value, (int, float, str)) for value in first.configs[0].values())
    assert first.rows == [({"loss": 1.0, "cause": "ok"}, 1)]
    assert second.rows == [({"loss": 1.0}, 1)]
    assert first.finished and second.finished


def test_a_resumed_run_continues_and_a_new_one_does_not(tmp_path: Path, recorders: list[Recorder]) -> None:
    config = experiment("recorder", "numbers", run_name="mine")
    start(tmp_path, config).close()
    start(tmp_path, config, step=7).close()
    start(tmp_path, config).close()
    assert [tracker.run.known_id for tracker in recorders[::2]] == [None, "drawn-by-the-service", None]
    own = [tracker.run.id for tracker in recorders[1::2]]
    assert own[0] == own[1] != own[2] and len(own[0]) == 32
    assert [len(tracker.configs) for tracker in recorders] == [1, 1, 0, 0, 1, 1]
    assert recorders[2].run.step == 7 and recorders[2].run.name == "mine"


def test_the_run_id_of_earlier_versions_is_known(tmp_path: Path, recorders: list[Recorder]) -> None:
    (tmp_path / "wandb_id").write_text("0123\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trackers._built_in, "wandb", f"{__name__}:record")
        start(tmp_path, experiment("wandb"), step=1).close()
    assert recorders[0].run.known_id == "0123"


def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, recorders: list[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    opened = start(tmp_path, experiment("recorder", "numbers"))
    with caplog.at_level(logging.WARNING):
        opened.log({"fail": "x", "loss": 1.0}, 1)
        opened.log({"loss": 2.0}, 2)
    opened.close()
    first, second = recorders
    assert first.rows == [] and second.rows == [({"loss": 1.0}, 1), ({"loss": 2.0}, 2)]
    assert [record.getMessage() for record in caplog.records] == [
        "tracker recorder failed and is no longer used: ConnectionError: gone"
    ]


def test_a_tracker_that_is_missing_or_does_not_start_is_a_mistake(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Recorder) -> None:
        raise ImportError("No module named 'x'", name="x")

    monkeypatch.setattr(Recorder, "start", missing)
    with pytest.raises(UserError, match=r"^tracking\.trackers: got 'recorder', which is not installed \(x\); allowed"):
        start(tmp_path, experiment("recorder"))

    def refused(_: Recorder) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(Recorder, "start", refused)
    with pytest.raises(UserError, match=r"got 'recorder', which does not start \(RuntimeError: no API key\)"):
        start(tmp_path, experiment("recorder"))


def test_an_unknown_tracker_is_found_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match=r"^tracking\.trackers\[0\]: got 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        experiment("tensorbord")


@needs_tensorboard
@needs_wandb
@pytest.mark.slow
def test_tensorboard_and_wandb_together_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    config = experiment("tensorboard", "wandb", wandb_mode="offline")
    first = start(tmp_path, config)
    for step in (1, 2, 3):
        first.log({"train/loss": float(step)}, step)
    first.close()
    ids = json.loads((tmp_path / "trackers.json").read_text())
    second = start(tmp_path, config, step=2)  # the checkpoint is of step 2
    second.log({"train/loss": 30.0}, 3)
    second.close()
    assert json.loads((tmp_path / "trackers.json").read_text()) == ids
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    runs = [path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs == [ids["wandb"]] * 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and not any(secret.encode() in path.read_bytes() for path in files)


def test_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = experiment("mlflow", project="p")
    for step in (None, 1):
        opened = start(tmp_path / "run", config, step=step)
        opened.log({"loss": 1.0, "x/t2v/R@1": 2.0, "note": "text"}, (step or 0) + 1)
        opened.close()
    (run,) = mlflow.search_runs(experiment_names=["p"], output_format="list")
    assert run.data.params["seed"] == "3" and run.data.metrics == {"loss": 1.0, "x/t2v/R_at_1": 2.0}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2]
