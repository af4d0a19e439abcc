"""Two processes compute what one does; a failure on one of them ends both; signals save.

All through torchrun on CPU, two launches for the whole file (each costs some ten seconds of importing).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.training.run import evaluate_checkpoint, train
from support.runs import REPOSITORY, environment, free_ports, losses, make_data, read_json, tiny_mapping, torchrun

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """23 clips, an odd number for evaluation; the broken copy has one clip of zero bytes."""
    folder = tmp_path_factory.mktemp("data")
    files = make_data(folder, videos=23)
    broken = folder / "broken"
    (broken / "clips").mkdir(parents=True)
    for clip in (files["videos"].parent / "clips").iterdir():
        (broken / "clips" / clip.name).write_bytes(b"" if clip.name == "c5.avi" else clip.read_bytes())
    (broken / "manifest.jsonl").write_bytes(files["videos"].read_bytes())
    return {**files, "broken": broken / "manifest.jsonl"}


def joint(data: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Videos and pictures, two passes a step, a stage change, clipping, evaluation with several windows."""
    return tiny_mapping(
        data,
        folder,
        data={
            "sources": [
                {"name": "videos", "path": str(data["videos"])},
                {"name": "pictures", "path": str(data["pictures"])},
            ],
            "decode": {"backend": "pyav", "threads": 1},
        },
        curriculum={
            "stages": [
                {"frames": 1, "batch_sizes": {"videos": 6, "pictures": 4}, "steps": 4},
                {"frames": 3, "batch_sizes": {"videos": 4, "pictures": 4}, "steps": 4},
            ],
            "gradient_accumulation_steps": 2,
        },
        model={
            "video": {"size": "pico_patch16_32", "attention": "sdpa"},
            "text": {"name": str(data["tower"]), "max_tokens": 12},
            "embedding_width": 16,
            "expansion": "nearest",
        },
        evaluation={
            "every": "end",
            "sources": [{"name": "held_out", "path": str(data["videos"])}],
            "batch_size": 5,
            "stride_seconds": 0.1,
        },
    )


def bad(data: dict[str, Path], folder: Path, **decode: Any) -> dict[str, Any]:
    return tiny_mapping(
        data,
        folder,
        data={
            "sources": [{"name": "videos", "path": str(data["broken"])}],
            "decode": {"backend": "pyav", "threads": 1, **decode},
        },
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 12}]},
    )


def epochs(data: dict[str, Path], folder: Path) -> dict[str, Any]:
    """23 clips in batches of four: epochs end in steps 6 and 12."""
    return tiny_mapping(
        data,
        folder,
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 14}]},
        evaluation={
            "every": "epoch",
            "keep_best": "validation_loss",
            "sources": [{"name": "held_out", "path": str(data["videos"])}],
            "batch_size": 5,
        },
    )


Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def launched(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes]:
    """Run every job in one launch of two processes; outcomes by job, one per rank."""
    folder = tmp_path_factory.mktemp("two")
    one = tiny_mapping(data, folder / "world", training={"expected_world_size": 3, "device": "cpu"})
    jobs: dict[str, dict[str, Any]] = {
        "joint": {"kind": "train", "config": joint(data, folder / "joint")},
        "not_local": {"kind": "train", "config": {**joint(data, folder / "not_local"), "loss": {"local": False}}},
        "best": {"kind": "train", "config": epochs(data, folder / "best")},
        "skip": {"kind": "train", "config": bad(data, folder / "skip", max_bad_share=0.5)},
        "error": {"kind": "train", "config": bad(data, folder / "error", on_bad_clip="error")},
        "defect": {"kind": "train", "config": bad(data, folder / "defect"), "fail_on_rank": 1},
        "world": {"kind": "train", "config": one},
        "evaluate": {
            "kind": "evaluate",
            "config": joint(data, folder / "joint"),
            "checkpoint": str(folder / "joint" / "checkpoints" / "step_00000008"),
            "output": str(folder / "evaluation.json"),
        },
    }
    for job, port in zip(jobs.values(), free_ports(len(jobs)), strict=True):
        job["port"] = port
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(jobs.values())), encoding="utf-8")
    worker = REPOSITORY / "tests" / "support" / "train_worker.py"
    done = subprocess.run(
        torchrun(str(worker), str(path)), env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_rank = [json.loads(Path(f"{path}.rank{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    return folder, {name: [outcomes[index] for outcomes in by_rank] for index, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def alone(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The joint run in this process."""
    folder = tmp_path_factory.mktemp("one") / "joint"
    assert train(config_from_mapping(joint(data, folder))) == 0
    return folder


@pytest.mark.parametrize("name", ["joint", "not_local"])
def test_two_processes_train_as_one_with_the_whole_batch(
    launched: tuple[Path, Outcomes], alone: Path, name: str
) -> None:
    folder, outcomes = launched
    assert [outcome["code"] for outcome in outcomes[name]] == [0, 0], outcomes[name]
    assert losses(folder / name) == pytest.approx(losses(alone), abs=1e-5)
    rows, expected = (read_json_lines(run / "steps.jsonl") for run in (folder / name, alone))
    assert [row["clips"] for row in rows] == [row["clips"] for row in expected]
    norms = [row["gradient_norm"] for row in expected]
    assert [row["gradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    stages = read_json(folder / name / "stages.json")
    assert [row["num_devices"] for row in stages] == [2, 2]
    assert read_json(folder / name / "environment.json")["distributed_type"] == "MULTI_CPU"


def test_evaluation_by_two_is_that_by_one_with_every_clip_once(
    launched: tuple[Path, Outcomes], alone: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """During training against one process's run, and by the evaluate command against one process, same checkpoint."""
    folder, outcomes = launched
    (row,), (expected,) = (read_json(run / "metrics.json")["evaluations"] for run in (folder / "joint", alone))
    assert (row["num_videos"], row["num_queries"]) == (23, 23)
    assert row["windows"] == expected["windows"] > 2 * 23
    assert [outcome["code"] for outcome in outcomes["evaluate"]] == [0, 0], outcomes["evaluate"]
    (by_two,) = read_json(folder / "evaluation.json")["evaluations"]
    checkpoint = str(folder / "joint" / "checkpoints" / "step_00000008")
    result = evaluate_checkpoint(config_from_mapping(joint(data, tmp_path)), checkpoint)
    (by_one,) = result["evaluations"]
    assert by_two["metrics"] == by_one["metrics"] == row["metrics"]
    assert (by_two["windows"], by_two["num_videos"]) == (by_one["windows"], by_one["num_videos"])


def test_two_keep_the_best_as_one_does(launched: tuple[Path, Outcomes], data: dict[str, Path], tmp_path: Path) -> None:
    folder, outcomes = launched
    assert [outcome["code"] for outcome in outcomes["best"]] == [0, 0], outcomes["best"]
    assert train(config_from_mapping(epochs(data, tmp_path / "run"))) == 0
    rows, expected = (read_json(run / "metrics.json")["evaluations"] for run in (folder / "best", tmp_path / "run"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [6, 12, 14]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    for run, own in ((folder / "best", rows), (tmp_path / "run", expected)):
        lowest = min(own, key=lambda row: row["loss"])["step"]
        assert os.readlink(run / "checkpoints" / "best") == f"step_{lowest:08d}"
        (here,) = [row["loss"] for row in expected if row["step"] == lowest]
        assert here == pytest.approx(min(row["loss"] for row in expected), abs=2e-4), "equally good for one process"


def test_a_bad_clip_on_one_rank_is_recorded_once(launched: tuple[Path, Outcomes]) -> None:
    """Twelve batches of four pass over each of 23 clips twice at most."""
    folder, outcomes = launched
    assert [outcome["code"] for outcome in outcomes["skip"]] == [0, 0], outcomes["skip"]
    rows = read_json_lines(folder / "skip" / "bad_clips.jsonl")
    assert 1 <= len(rows) <= 3 and {row["clip_id"] for row in rows} == {"c5"}
    assert len({row["step"] for row in rows}) == len(rows)
    assert sum(row["bad_clips"] for row in read_json_lines(folder / "skip" / "steps.jsonl")) == len(rows)


@pytest.mark.parametrize(
    ("name", "errors", "message"),
    [
        ("error", ["UserError", "UserError"], "clip 'c5' of source 'videos' cannot be read"),
        ("defect", ["PeerError", "ZeroDivisionError"], "a defect on one rank"),
        ("world", ["UserError", "UserError"], "training.expected_world_size: got 2 process(es); allowed: 3"),
    ],
)
def test_a_failure_on_one_rank_ends_both_at_once(
    launched: tuple[Path, Outcomes], name: str, errors: list[str], message: str
) -> None:
    folder, outcomes = launched
    assert [outcome["error"] for outcome in outcomes[name]] == errors, outcomes[name]
    assert all(message in outcome["message"] for outcome in outcomes[name])
    assert all(outcome["seconds"] < 60 for outcome in outcomes[name])
    if name != "world":
        status = read_json(folder / name / "status.json")
        assert (status["state"], status["exit_code"]) == ("failed", 2 if name == "error" else 1)


def test_a_signal_to_the_launcher_saves_on_both_and_says_so(data: dict[str, Path], tmp_path: Path) -> None:
    """train.py under torchrun, SIGTERM to torchrun."""
    mapping = tiny_mapping(
        data,
        tmp_path / "run",
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 100_000}]},
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config_from_mapping(mapping)), encoding="utf-8")
    command = torchrun(str(REPOSITORY / "train.py"), "--config", str(tmp_path / "config.yaml"))
    process = subprocess.Popen(command, env=environment(), stdout=sys.stderr, start_new_session=True)
    try:
        steps = tmp_path / "run" / "steps.jsonl"
        deadline = time.monotonic() + 240
        while not (steps.exists() and steps.stat().st_size > 0):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert len(losses(tmp_path / "run")) == status["step"] > 0
    state = read_json(tmp_path / "run" / "checkpoints" / f"step_{status['step']:08d}" / "state.json")
    assert state["position"]["step"] == status["step"] and not state["stage_complete"]
