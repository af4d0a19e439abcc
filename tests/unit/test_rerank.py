"""Dual softmax against a written-out form."""

from __future__ import annotations

import math

import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation import dual_softmax, retrieval_metrics


@pytest.mark.parametrize("direction", ["t2v", "v2t"])
def test_dual_softmax_is_written_out(direction: str) -> None:
    sim = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = dual_softmax(sim, scale=5.0, direction=direction)
    for q in range(4):
        for v in range(3):
            others = sim[:, v] if direction == "t2v" else sim[q, :]
            weight = math.exp(5 * sim[q, v]) / sum(math.exp(5 * float(s)) for s in others)
            assert got[q, v].item() == pytest.approx(float(sim[q, v]) * weight)


def test_a_hub_video_loses_its_advantage() -> None:
    """Video 0 is closest to every query; only its own query should keep it."""
    sim = torch.tensor([[0.9, 0.1, 0.1], [0.6, 0.5, 0.1], [0.6, 0.1, 0.5]])
    assert retrieval_metrics(sim)["t2v/R@1"] == pytest.approx(100 / 3)
    assert retrieval_metrics(dual_softmax(sim, scale=20.0))["t2v/R@1"] == 100.0


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="direction: got 't2t'"):
        dual_softmax(torch.eye(2), direction="t2t")
    with pytest.raises(UserError, match="scale: got 0"):
        dual_softmax(torch.eye(2), scale=0)
