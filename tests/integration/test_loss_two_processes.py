"""The gathered loss on two processes: gradients and value equal one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frozen_fast.losses import contrastive_loss
from support import loss_worker

pytestmark = pytest.mark.integration
WORLD_SIZE = 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    output = folder / "result.pt"
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, loss_worker.__file__, str(folder / "store"), str(rank), str(WORLD_SIZE), str(output)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    logs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize(("dtype", "local", "chunk_rows"), loss_worker.CASES)
def test_gradients_and_value_equal_one_process(
    two_ranks: dict, dtype: torch.dtype, local: bool, chunk_rows: int
) -> None:
    model, video, text = loss_worker.build(dtype)
    loss = contrastive_loss(*model(video, text), loss_worker.TEMPERATURE)
    loss.backward()
    result = two_ranks["results"][str(dtype), local, chunk_rows]
    assert not result["requires_grad"]
    torch.testing.assert_close(result["value"], loss.detach(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            result["gradients"][name], parameter.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name
        )


def test_features_sent_in_bf16_change_the_gradient_by_their_rounding(two_ranks: dict) -> None:
    """A feature keeps 8 bits: value and gradients move by a share of that order, and the gradient's direction stays."""
    exact, rounded = (two_ranks["results"][str(gather)] for gather in loss_worker.GATHERS)
    assert exact["value"] != rounded["value"]
    torch.testing.assert_close(rounded["value"], exact["value"], rtol=0.01, atol=0)
    ours, theirs = (torch.cat([g.flatten() for g in one["gradients"].values()]) for one in (rounded, exact))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.05
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_unequal_batches_are_refused_on_every_rank(two_ranks: dict) -> None:
    for message in two_ranks["uneven"]:
        assert message == "clips per rank: got [3, 4]; allowed: the same number on each of the 2 ranks"
