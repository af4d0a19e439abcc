"""Which captions become queries, and CLIP2Video's v2t against a brute-force form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation import choose_protocol, queries, retrieval_metrics, v2t_max_over_captions

CAPTIONS = [["a", "b"], [], ["c"], ["d", "e", "f"]]


@pytest.mark.parametrize(
    ("protocol", "texts", "own"),
    [
        ("plain", ["a", "c", "d"], [0, 2, 3]),
        ("several_captions", ["a", "b", "c", "d", "e", "f"], [0, 0, 2, 3, 3, 3]),
        ("paragraph", ["a b", "c", "d e f"], [0, 2, 3]),
    ],
)
def test_queries_of_each_protocol(protocol: str, texts: list[str], own: list[int]) -> None:
    assert queries(CAPTIONS, protocol) == (texts, own, protocol)


def test_auto_goes_by_the_number_of_captions() -> None:
    assert choose_protocol(CAPTIONS) == "several_captions"
    assert choose_protocol([["a"], [], ["b"]]) == "plain"
    assert queries(CAPTIONS)[2] == "several_captions"
    assert queries([["a"], ["b"]]) == (["a", "b"], [0, 1], "plain")


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"evaluation.protocol: got 'paragraf' \(did you mean 'paragraph'\?\)"):
        queries(CAPTIONS, "paragraf")
    with pytest.raises(UserError, match="got 2 clips without a caption"):
        queries([[], []])


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("levels", [0, 4])
def test_v2t_max_over_captions_equals_brute_force(levels: int, as_tensor: bool) -> None:
    rng = np.random.default_rng(levels)
    videos, count = 30, 80
    own = np.concatenate([np.arange(28), rng.integers(-1, 28, count - 28)])  # two videos without captions
    sim = rng.normal(size=(count, videos)) if not levels else rng.integers(0, levels, (count, videos)) * 0.5
    ranks = []
    for video in range(28):
        best = [max(sim[q, video] for q in range(count) if own[q] == other) for other in range(28)]
        places = [place for place, s in enumerate(sorted(best, reverse=True), start=1) if s == best[video]]
        ranks.append(sum(places) / len(places))
    got = v2t_max_over_captions(torch.from_numpy(sim) if as_tensor else sim, own)
    assert got["v2t/MdR"] == pytest.approx(np.median(ranks))
    assert got["v2t/MnR"] == pytest.approx(np.mean(ranks))
    for k in (1, 5, 10, 50):
        assert got[f"v2t/R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
    plain = retrieval_metrics(sim, own)
    assert {key: got[key] for key in got if key.startswith("t2v")} == {k: v for k, v in plain.items() if "t2v" in k}
    if not levels:
        assert got["v2t/R@1"] == plain["v2t/R@1"]
        assert got["v2t/MnR"] < plain["v2t/MnR"]
