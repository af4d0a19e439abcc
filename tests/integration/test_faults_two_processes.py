"""Bad numbers, a device without memory and a slow rank with two processes: DDP, ZeRO-2 and FSDP2 act on every rank.

The fault is on rank 1 alone each time. DDP's runs share one launch; the others take one each, with the shipped files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.records.checkpoint import read_state, read_tensors
from frozen_fast.report.markdown import to_markdown
from frozen_fast.report.run_data import read_run
from frozen_fast.report.write_report import build_report
from frozen_fast.training.run import train
from support.faults import inject
from support.runs import REPOSITORY, environment, free_ports, losses, make_data, read_json, tiny_mapping, torchrun

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NAN = {"rank": 1, "nan_at": [3]}
NAN_ONCE = {"rank": 1, "nan_at": [6], "seed": 1}
MEMORY = {"rank": 1, "most_clips": 2}
SLOW = {"rank": 1, "slow_seconds": 0.5}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "skip": (NAN, {"on_non_finite": "skip"}),
    "roll_back": (NAN_ONCE, {"on_non_finite": "roll_back"}),
    "stop": (NAN, {}),
    "memory": (MEMORY, {"on_out_of_memory": "smaller_micro_batch"}),
    "slow": (SLOW, {}),
}
Outcomes = dict[str, list[dict[str, Any]]]
FILES = {"zero2": "cpu_2_zero2", "fsdp2": "cpu_2_fsdp2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


def mapping(data: dict[str, Path], folder: Path, case: str) -> dict[str, Any]:
    """Eight clips a pass, four of them on each of two ranks; five steps of one frame and five of four."""
    stages = [{"frames": frames, "global_batch_size": 8, "steps": 5} for frames in (1, 4)]
    return tiny_mapping(
        data,
        folder,
        curriculum={"stages": stages},
        training={"device": "cpu", "precision": "fp32", **CASES[case][1]},
        checkpoints={"every_steps": 1, "keep": 20},
        optimizer={"learning_rate": 1e-4, "gradient_clip_norm": 1.0},
    )


@pytest.fixture(scope="module")
def ddp(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes]:
    """Every case in one launch; outcomes by case, one per rank."""
    folder = tmp_path_factory.mktemp("ddp")
    jobs = [
        {"kind": "train", "config": mapping(data, folder / case, case), "fault": fault, "port": port}
        for (case, (fault, _)), port in zip(CASES.items(), free_ports(len(CASES)), strict=True)
    ]
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    worker = REPOSITORY / "tests" / "support" / "train_worker.py"
    done = subprocess.run(
        torchrun(str(worker), str(path)), env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_rank = [json.loads(Path(f"{path}.rank{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    return folder, {case: [outcomes[index] for outcomes in by_rank] for index, case in enumerate(CASES)}


def launch(data: dict[str, Path], folder: Path, strategy: str, case: str) -> Path:
    """A run through accelerate launch; its folder."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    config = folder / "config.yaml"
    config.write_text(dump_yaml(config_from_mapping(mapping(data, folder / "run", case))), encoding="utf-8")
    file = REPOSITORY / "configs" / "accelerate" / f"{FILES[strategy]}.yaml"
    worker = REPOSITORY / "tests" / "support" / "faulty_train.py"
    arguments = [str(worker), json.dumps(CASES[case][0]), "--config", str(config)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture
def run(
    request: pytest.FixtureRequest, data: dict[str, Path], tmp_path: Path, ddp: tuple[Path, Outcomes]
) -> tuple[str, Path]:
    """(strategy, folder of a finished run)."""
    strategy, case = request.param
    if strategy != "ddp":
        return strategy, launch(data, tmp_path, strategy, case)
    assert [outcome["code"] for outcome in ddp[1][case]] == [0, 0], ddp[1][case]
    return strategy, ddp[0] / case


def alone(data: dict[str, Path], folder: Path, case: str) -> Path:
    """The same run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        inject(patch, {**CASES[case][0], "rank": None})
        assert train(config_from_mapping(mapping(data, folder / "alone", case))) == 0
    return folder / "alone"


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    weights, state = read_tensors(folder / "checkpoints" / f"step_{step:08d}")
    return {**weights, **{f"{name}/{key}": value for name, kept in state.items() for key, value in kept.items()}}


@pytest.mark.parametrize("run", [("ddp", "skip"), ("zero2", "skip"), ("fsdp2", "skip")], indirect=True)
def test_a_step_is_skipped_on_every_rank(run: tuple[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    _, folder = run
    before, after = tensors(folder, 2), tensors(folder, 3)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    found = losses(folder)
    assert found[2] is None and len(found) == 10
    assert found == [loss and pytest.approx(loss, abs=1e-4) for loss in losses(alone(data, tmp_path, "skip"))]
    (lost,) = read_json_lines(folder / "non_finite.jsonl")
    assert (lost["step"], lost["action"], len(set(lost["clip_ids"]))) == (3, "skip", 8), "the clips of both ranks"


@pytest.mark.parametrize("run", [("ddp", "roll_back"), ("zero2", "roll_back"), ("fsdp2", "roll_back")], indirect=True)
def test_a_run_rolls_back_and_ends_done(run: tuple[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    _, folder = run
    assert read_json(folder / "status.json")["state"] == "done"
    found = losses(folder)
    assert len(found) == 10 and None not in found
    assert found == pytest.approx(losses(alone(data, tmp_path, "roll_back")), abs=1e-4)
    assert [row["kind"] for row in read_json_lines(folder / "events.jsonl")] == ["roll_back"]
    assert read_state(folder / "checkpoints" / "step_00000010").rollbacks == 1


def test_a_stop_is_one_line_on_every_rank(ddp: tuple[Path, Outcomes]) -> None:
    folder, outcomes = ddp
    for outcome in outcomes["stop"]:
        assert outcome["error"] == "NotFiniteError" and outcome["message"].startswith(
            "loss: got nan at step 3 (stage 0"
        )
    (lost,) = read_json_lines(folder / "stop" / "non_finite.jsonl")
    assert len(set(lost["clip_ids"])) == 8 and read_json(folder / "stop" / "status.json")["exit_code"] == 2


@pytest.mark.parametrize("run", [("ddp", "memory"), ("zero2", "memory")], indirect=True)
def test_all_ranks_cut_their_batches_where_one_is_out_of_memory(
    run: tuple[str, Path], ddp: tuple[Path, Outcomes]
) -> None:
    strategy, folder = run
    events = read_json_lines(folder / "events.jsonl")
    assert [event["kind"] for event in events] == ["out_of_memory"] * 2, "one in each stage"
    told = "4 clips a pass on a rank do not fit; now 2 parts of 2; a clip meets 3 negatives in place of 7"
    assert told in events[0]["message"]
    assert [row["clips"] for row in read_json_lines(folder / "steps.jsonl")] == [8] * 10
    assert losses(folder) == pytest.approx(losses(ddp[0] / "memory"), abs=1e-4)
    assert losses(folder)[0] < losses(ddp[0] / "slow")[0], "fewer negatives, a lower loss"


def test_fsdp2_refuses_smaller_micro_batches(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="training.on_out_of_memory: got 'smaller_micro_batch' with fsdp2"):
        launch(data, tmp_path, "fsdp2", "memory")


def test_the_report_names_the_slow_rank(ddp: tuple[Path, Outcomes]) -> None:
    folder = ddp[0] / "slow"
    for stage in read_json(folder / "stages.json"):
        times = [row["forward_seconds"] / row["steps"] for row in stage["ranks"]]
        assert times[1] > times[0] + 0.2
    text = to_markdown(build_report(read_run(folder)))
    assert (
        "Ranks slower than the median by more than 20 %" in text and "- rank 1 (" in text and "- rank 0 (" not in text
    )
