"""Dual softmax and QB-Norm against written-out forms."""

from __future__ import annotations

import math

import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation import Reranking, dual_softmax, qb_norm, reranked_metrics, retrieval_metrics


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


@pytest.mark.parametrize("k", [1, 3])
def test_qb_norm_is_the_published_formula(k: int) -> None:
    """Dynamic inverted softmax, written out query by query."""
    generator = torch.Generator().manual_seed(k)
    sim = torch.rand(7, 9, generator=generator, dtype=torch.float64)
    bank = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    hubs = {int(video) for row in bank for video in row.argsort(descending=True)[:k]}
    got = qb_norm(sim, bank, beta=20.0, k=k)
    changed = 0
    for query in range(7):
        expected = sim[query].clone()
        if int(sim[query].argmax()) in hubs:
            changed += 1
            for video in range(9):
                total = sum(math.exp(20.0 * float(bank[b, video])) for b in range(5))
                expected[video] = math.exp(20.0 * float(sim[query, video])) / total
        assert torch.allclose(got[query], expected, rtol=1e-10)
    assert 0 < changed < 7, "both cases are there"


def test_qb_norm_takes_a_hub_down() -> None:
    """Video 0 is nearest to every caption of the bank; the query whose video is 1 finds it again."""
    sim = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    bank = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.85, 0.0]])
    assert retrieval_metrics(sim)["t2v/R@1"] == 50.0
    assert retrieval_metrics(qb_norm(sim, bank))["t2v/R@1"] == 100.0


def test_reranked_metrics_are_those_of_the_reranked_matrix() -> None:
    sim = torch.rand(6, 3, generator=torch.Generator().manual_seed(2))
    bank = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    own = [0, 0, 1, 1, 2, 2]
    wanted = Reranking(names=("dual_softmax", "qb_norm"), scale=10.0, beta=5.0)
    found = reranked_metrics(wanted, sim, own, bank)
    both = retrieval_metrics(dual_softmax(sim, 10.0, "v2t"), own)
    assert found["dual_softmax"]["v2t/R@1"] == both["v2t/R@1"]
    assert found["dual_softmax"]["t2v/MnR"] == retrieval_metrics(dual_softmax(sim, 10.0, "t2v"), own)["t2v/MnR"]
    assert set(found["qb_norm"]) == {name for name in both if name.startswith("t2v/")}
    assert found["qb_norm"]["t2v/MnR"] == retrieval_metrics(qb_norm(sim, bank, 5.0), own)["t2v/MnR"]
    with pytest.raises(UserError, match="evaluation.rerank: got 'qb_norm' without a querybank"):
        reranked_metrics(wanted, sim, own)


@pytest.mark.parametrize(
    ("bank", "options", "message"),
    [
        (torch.rand(2, 4), {}, r"querybank: got similarities \[2, 4\] beside \[2, 3\]"),
        (torch.rand(0, 3), {}, "B >= 1"),
        (torch.rand(2, 3), {"beta": 0.0}, "beta above 0"),
        (torch.rand(2, 3), {"k": 4}, "k from 1 to 3"),
    ],
)
def test_qb_norm_refuses(bank: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        qb_norm(torch.rand(2, 3), bank, **options)
