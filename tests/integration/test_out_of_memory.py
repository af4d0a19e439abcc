"""A device that runs out of memory: the message, and smaller parts with the same clips a step, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.parallel.start import start_parallel
from frozen_fast.records.checkpoint import read_state
from frozen_fast.training.retrieval_task import RetrievalTask
from frozen_fast.training.run import train
from frozen_fast.training.step import rehearse
from support.faults import Fault, replacing_faults
from support.runs import losses, make_data, read_json, tiny_config, without_reports

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return replacing_faults(monkeypatch)


def experiment(data: dict[str, Path], folder: Path, batch: int, passes: int, **training: Any) -> ExperimentConfig:
    """Three steps of one frame and three of four; 24 clips."""
    stages = [{"frames": frames, "global_batch_size": batch, "steps": 3} for frames in (1, 4)]
    return tiny_config(
        data,
        folder,
        curriculum={"stages": stages, "gradient_accumulation_steps": passes},
        training={"device": "cpu", "precision": "fp32", **training},
        checkpoints={"every_steps": 2, "keep": 9},
    )


def test_the_message_says_where_and_what_fits(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    fault(most_clips=3)
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(experiment(data, folder, 4, 1))
    told = str(caught.value)
    begin = "out of memory at step 1 (stage 0, 1 frames, source videos): got 4 clips a pass on rank 0, global batch 4; "
    assert "\n" not in told and told.startswith(begin + "allowed: ")
    for help in (
        f"frozen-fast find-batch-size --config {folder / 'config.yaml'} --frames 1",
        "model.video.checkpointed_blocks=",
        "curriculum.stages[0].global_batch_size=2 with curriculum.gradient_accumulation_steps=2",
        "1 negatives a clip in place of 3",
        "training.on_out_of_memory=smaller_micro_batch",
    ):
        assert help in told
    status = read_json(folder / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_parts_train_as_gradient_accumulation_does(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    """Four clips of which two fit are two passes of two clips."""
    assert train(experiment(data, tmp_path / "accumulated", 2, 2)) == 0
    fault(most_clips=2)
    folder = tmp_path / "run"
    assert train(experiment(data, folder, 4, 1, on_out_of_memory="smaller_micro_batch")) == 0
    assert losses(folder) == pytest.approx(losses(tmp_path / "accumulated"), rel=1e-6)
    assert [row["clips"] for row in read_json_lines(folder / "steps.jsonl")] == [4] * 6
    events = read_json_lines(folder / "events.jsonl")
    assert [event["kind"] for event in events] == ["out_of_memory"] * 2, "once in each stage"
    assert "now 2 parts of 2; a clip meets 1 negatives in place of 3" in events[0]["message"]


def test_a_resumed_run_keeps_its_parts(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    """The limit is gone, but the numbers stay those of the run."""
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    config = {"on_out_of_memory": "smaller_micro_batch"}
    fault(most_clips=1)
    assert train(experiment(data, straight, 4, 1, **config)) == 0
    checkpoint = straight / "checkpoints" / "step_00000002"
    assert read_state(checkpoint).batch_parts == {"videos": 4}
    fault(most_clips=4)
    assert train(experiment(data, cut, 4, 1, **config), resume=str(checkpoint)) == 0
    rows = {row["step"]: row["loss"] for row in read_json_lines(cut / "steps.jsonl")}
    assert rows[3] == losses(straight)[2] and rows[4] != losses(straight)[3], "the second stage starts whole"


def test_one_clip_that_does_not_fit_ends_the_run(data: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    fault(most_clips=0)
    with pytest.raises(UserError, match="^out of memory at step 1 .* got 1 clips a pass") as caught:
        train(experiment(data, tmp_path / "run", 4, 1, on_out_of_memory="smaller_micro_batch"))
    assert "smaller_micro_batch" not in str(caught.value)


def test_a_rehearsal_leaves_nothing_behind() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, video: torch.Tensor, text: dict[str, torch.Tensor]) -> Any:
            noise = torch.nn.functional.dropout(self.norm(video), 0.5)
            return {"embedding": self.used(text["x"])}, {"embedding": self.used(noise)}, {}

        def pair_similarities(self, text: Any, video: Any) -> torch.Tensor:
            return (text["embedding"] @ video["embedding"].T)[None]

    config = config_from_mapping({"training": {"device": "cpu", "precision": "fp32"}})
    parallel = start_parallel(config)
    try:
        model = Model()
        parallel.prepare(model, torch.optim.SGD(model.parameters()))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        drawn = torch.get_rng_state()
        rehearse(parallel, torch.randn(3, 4).fill_(2.0), {"x": torch.ones(3, 4)}, RetrievalTask.from_config(config))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        torch.set_rng_state(drawn)
        torch.randn(3, 4)
        expected = torch.get_rng_state()
        torch.set_rng_state(drawn)
        rehearse(parallel, torch.randn(3, 4), {"x": torch.ones(3, 4)}, RetrievalTask.from_config(config))
        assert torch.equal(torch.get_rng_state(), expected)
    finally:
        parallel.close()
