"""Retrieval metrics against a brute-force ranking, with ties, several and missing captions, and of every input type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation import metrics as metrics_module
from frozen_fast.evaluation import one_frame_ceiling, retrieval_metrics, retrieval_ranks, similarity, twin_accuracy


def rank_in(scores: list[float], index: int) -> float:
    """Rank from 1 of one entry: the mean of the places that equal scores take in a sorted list."""
    order = sorted(scores, reverse=True)
    places = [place for place, score in enumerate(order, start=1) if score == scores[index]]
    return sum(places) / len(places)


def brute_force(sim: np.ndarray, own: list[int]) -> dict[str, float]:
    rows = [row for row in range(len(own)) if own[row] >= 0]
    ranks = {"t2v": [rank_in(list(sim[row]), own[row]) for row in rows], "v2t": []}
    for video in range(sim.shape[1]):
        column = [sim[row, video] for row in rows]
        of_video = [rank_in(column, place) for place, row in enumerate(rows) if own[row] == video]
        if of_video:
            ranks["v2t"].append(min(of_video))
    metrics = {}
    for direction, values in ranks.items():
        recall = {k: 100 * sum(value <= k for value in values) / len(values) for k in (1, 5, 10, 50)}
        metrics.update({f"{direction}/R@{k}": recall[k] for k in recall})
        ordered = sorted(values)
        middle = len(ordered) // 2
        even = len(ordered) % 2 == 0
        metrics[f"{direction}/MdR"] = (ordered[middle - 1] + ordered[middle]) / 2 if even else ordered[middle]
        metrics[f"{direction}/MnR"] = sum(values) / len(values)
        metrics[f"{direction}/Geom"] = (recall[1] * recall[5] * recall[10]) ** (1 / 3)
    return metrics


def draw(queries: int, videos: int, seed: int, levels: int = 0) -> np.ndarray:
    """Random similarities; with `levels`, of so many different values only, so that ties abound."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (queries, videos)) / 8.0 if levels else rng.normal(size=(queries, videos))


def assert_same(got: dict[str, float], expected: dict[str, float]) -> None:
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("levels", [0, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 9, 120])
def test_one_caption_a_video(size: int, levels: int) -> None:
    sim = draw(size, size, seed=size, levels=levels)
    assert_same(retrieval_metrics(sim), brute_force(sim, list(range(size))))


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_several_and_missing_captions(seed: int, levels: int) -> None:
    queries, videos = 90, 37
    rng = np.random.default_rng(seed)
    own = rng.integers(0, videos - 5, queries)  # the last five videos have no caption
    own[rng.permutation(queries)[:7]] = -1  # some rows no video
    sim = draw(queries, videos, seed, levels)
    assert len(set(own)) > 20
    assert_same(retrieval_metrics(sim, own), brute_force(sim, own.tolist()))


def test_a_padded_row_changes_nothing_even_if_it_holds_nan() -> None:
    sim = draw(12, 4, seed=0)
    own = np.arange(12) % 4
    padded = np.vstack([sim[:5], np.full((2, 4), np.nan), sim[5:]])
    padded_own = np.concatenate([own[:5], [-1, -1], own[5:]])
    assert_same(retrieval_metrics(padded, padded_own), retrieval_metrics(sim, own))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16]
)
def test_types_and_layouts_give_the_same_numbers(dtype: torch.dtype) -> None:
    sim = torch.from_numpy(draw(40, 15, seed=3, levels=60) * 8).to(dtype)
    own = [row % 15 for row in range(40)]
    expected = brute_force(sim.double().numpy(), own)
    assert_same(retrieval_metrics(sim, own), expected)
    assert_same(retrieval_metrics(sim.T.contiguous().T, torch.tensor(own)), expected)
    if dtype != torch.bfloat16:
        assert_same(retrieval_metrics(sim.numpy(), np.array(own, dtype=np.int32)), expected)
        assert_same(retrieval_metrics(sim.numpy()[::-1], own[::-1]), expected)


def test_similarities_with_gradient_are_accepted() -> None:
    sim = torch.eye(4, requires_grad=True) * 2
    assert retrieval_metrics(sim)["t2v/R@1"] == 100.0


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, own = draw(50, 11, seed=5, levels=4), [row % 12 - 1 for row in range(50)]
    whole = retrieval_metrics(sim, own)
    for elements in (1, 11 * 7, 11 * 50):
        monkeypatch.setattr(metrics_module, "CHUNK_ELEMENTS", elements)
        assert_same(retrieval_metrics(sim, own), whole)


def test_perfect_and_worst_ranking() -> None:
    best = retrieval_metrics(np.eye(60))
    assert best["t2v/R@1"] == best["v2t/Geom"] == 100.0 and best["t2v/MdR"] == best["v2t/MnR"] == 1.0
    worst = retrieval_metrics(-np.eye(60))
    assert worst["t2v/R@50"] == worst["v2t/Geom"] == 0.0 and worst["t2v/MdR"] == worst["v2t/MnR"] == 60.0


def test_constant_similarities_of_msrvtt_full_are_chance() -> None:
    """Collaborative Experts' Concat row: 2990 videos, 59,794 captions, median ranks 1495.5 and 29897.5."""
    videos, queries = 2990, 59_794
    sim = torch.zeros(()).expand(queries, videos)
    metrics = retrieval_metrics(sim, np.arange(queries) % videos)
    assert (metrics["t2v/MdR"], metrics["v2t/MdR"]) == (1495.5, 29897.5)
    assert metrics["t2v/R@50"] == metrics["v2t/R@50"] == 0.0


def test_infinities_rank_last_and_first() -> None:
    sim = np.array([[-np.inf, 0.0], [np.inf, 1.0]])
    t2v, v2t = retrieval_ranks(sim)
    assert t2v.tolist() == [2.0, 2.0] and v2t.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("sim", "own", "message"),
    [
        (np.array([[1.0, np.nan], [0.0, 1.0]]), None, "similarities: got NaN"),
        (torch.tensor([[1.0, float("nan")]]), [0], "similarities: got NaN"),
        (np.zeros((3, 2)), None, r"video_of_query: got none for 3 queries and 2 videos"),
        (np.zeros((3, 2)), [0, 1], r"got 2 values from 0 to 1; allowed: 3 values"),
        (np.zeros((2, 2)), [0, 2], r"got 2 values from 0 to 2; allowed: 2 values, one a query, from 0 to 1"),
        (np.zeros((2, 2)), [0, -2], r"from -2 to 0"),
        (np.zeros((2, 2)), [-1, -1], r"got -1 for every query"),
        (np.zeros((2, 2)), [0.0, 1.0], r"video_of_query: got float64 of shape \[2\]"),
        (np.zeros((2, 2)), np.zeros((2, 1), dtype=int), r"of shape \[2, 1\]"),
        (np.zeros((2, 2)), [], r"got no values"),
        (np.zeros(4), None, r"similarities: got \[4\]"),
        (np.zeros((0, 3)), [], r"similarities: got \[0, 3\]"),
        ([[1.0]], None, "similarities: got list"),
    ],
)
def test_mistakes_are_named(sim: object, own: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval_metrics(sim, own)  # type: ignore[arg-type]
    assert issubclass(UserError, ValueError)


def test_similarity_is_the_cosine() -> None:
    text, video = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    expected = [[torch.dot(t, v) / t.norm() / v.norm() for v in video] for t in text]
    torch.testing.assert_close(similarity(text, video), torch.tensor(expected, dtype=torch.float64))
    assert similarity(text.bfloat16(), video.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError, match=r"\[5, 8\] and \[3, 7\]"):
        similarity(text, video[:, :7])


def test_twin_accuracy_counts_wins_and_half_ties() -> None:
    sim = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.7, 0.2, 0.0]])
    own, twins = [0, 1, 1, 2, -1], [1, 0, -1]
    # Query 0 wins, 1 loses, 2 ties, 3 has no twin, 4 no video.
    assert twin_accuracy(sim, twins, own) == pytest.approx(50.0)
    assert twin_accuracy(torch.from_numpy(sim[:2]), twins, own[:2]) == pytest.approx(50.0)
    assert twin_accuracy(sim[:1], twins, own[:1]) == 100.0
    assert twin_accuracy(sim, [-1, -1, -1], own) is None


def test_the_ceiling_of_one_frame_is_half_a_hit_for_each_query_with_a_twin() -> None:
    own, twins = [0, 1, 1, 2, -1], [1, 0, -1]
    assert one_frame_ceiling(np.zeros((5, 3)), twins, own) == pytest.approx(100 * (3 * 0.5 + 1) / 4)
    assert one_frame_ceiling(np.zeros((2, 2)), [1, 0]) == 50.0
    assert one_frame_ceiling(np.zeros((2, 2)), [-1, -1]) == 100.0
    # What it bounds: frames seen without their order, scored by chance between twins.
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        sim = np.kron(np.eye(4), np.ones((2, 2))) + 0.1 * np.repeat(rng.random((8, 4)), 2, axis=1)
        sim += 1e-6 * rng.random((1, 8))
        found.append(retrieval_metrics(sim)["t2v/R@1"])
    assert np.mean(found) == pytest.approx(one_frame_ceiling(sim, [1, 0, 3, 2, 5, 4, 7, 6]), abs=1e-9)


@pytest.mark.parametrize("twins", [[1, 0], [0, 1, 2], [1, 3, -1], [1, 0, -2]])
def test_twin_mistakes_are_named(twins: list[int]) -> None:
    with pytest.raises(UserError, match="twin_of_video: got"):
        twin_accuracy(np.zeros((3, 3)), twins)
