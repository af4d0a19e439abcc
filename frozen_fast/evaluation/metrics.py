"""Retrieval metrics from a similarity matrix: recall at k, median and mean rank, geometric mean, twin accuracy.

Axis letters: Q text queries (captions), V gallery videos, D width of the common space, K rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frozen_fast.common.similarity import cosine_similarities
from frozen_fast.errors import UserError

RECALL_AT = (1, 5, 10, 50)
# Elements of the similarity matrix compared at once: a few hundred megabytes of temporaries.
CHUNK_ELEMENTS = 1 << 24

Similarities = Tensor | np.ndarray
Assignment = Sequence[int] | Tensor | np.ndarray


def similarity(text_QD: Tensor, video_VD: Tensor) -> Tensor:
    """Return cosine similarities [Q, V] in fp32 (fp64 if both inputs are); normalises both inputs.

    Raises:
        UserError: the widths differ.
    """
    if text_QD.ndim != 2 or video_VD.ndim != 2 or text_QD.shape[1] != video_VD.shape[1]:
        got = f"{list(text_QD.shape)} and {list(video_VD.shape)}"
        raise UserError(f"embeddings: got shapes {got}; allowed: [Q, D] and [V, D] of one width")
    return cosine_similarities(text_QD, video_VD)


def retrieval_metrics(sim_QV: Similarities, video_of_query: Assignment | None = None) -> dict[str, float]:
    """Compute the metrics of text-to-video and video-to-text retrieval.

    Ranks start at 1. Equal similarities get the mean of their ranks. A hit at k is a rank of at most k. t2v: each query
    ranks all videos. v2t: every video ranks all queries, and the best rank of its own queries is used. Videos without a
    query are part of the gallery of t2v and are excluded from v2t. This is the protocol of Collaborative Experts and
    Frozen in Time, except for ties: a constant matrix gives chance, not 100 %.

    Args:
        sim_QV: similarities [Q, V], larger is closer; numpy or torch, any real type and device. It is compared in
            its own type in chunks of rows, without a copy.
        video_of_query: for each row the column of its video; -1 marks a row without a caption (padding), which is
            excluded. None: row i belongs to column i, and Q equals V.

    Returns:
        t2v/R@1, /R@5, /R@10, /R@50 (percent), /MdR, /MnR (median and mean rank), /Geom (geometric mean of R@1, 5
        and 10), and the same for v2t/.

    Raises:
        UserError (a ValueError): NaN among the similarities, a wrong shape, an assignment outside the gallery.
    """
    t2v, v2t = retrieval_ranks(sim_QV, video_of_query)
    return {**summary(t2v, "t2v"), **summary(v2t, "v2t")}


def retrieval_ranks(sim_QV: Similarities, video_of_query: Assignment | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The ranks for retrieval_metrics: (t2v of each query, v2t of each video that has a query), float64."""
    rows, own = assigned_rows(sim_QV, video_of_query)
    best_V = own_maximum(sim_QV, rows, own)
    device = best_V.device
    above_V = torch.zeros(len(best_V), dtype=torch.int64, device=device)
    equal_V = torch.zeros_like(above_V)
    t2v = []
    for chunk_KV, own_K in chunks(sim_QV, rows, own):
        score_K1 = chunk_KV.gather(1, own_K[:, None])
        above_K = (chunk_KV > score_K1).sum(1)
        equal_K = (chunk_KV == score_K1).sum(1)
        t2v.append(_mean_rank(above_K, equal_K))
        above_V += (chunk_KV > best_V).sum(0)
        equal_V += (chunk_KV == best_V).sum(0)
    has_query_V = torch.zeros(len(best_V), dtype=torch.bool, device=device)
    has_query_V[torch.as_tensor(own, device=device)] = True
    v2t = _mean_rank(above_V[has_query_V], equal_V[has_query_V])
    return torch.cat(t2v).cpu().numpy(), v2t.cpu().numpy()


def summary(ranks: np.ndarray, direction: str) -> dict[str, float]:
    """R@k in percent, median and mean rank, and geometric mean of R@1, 5, 10, from ranks that start at 1."""
    recall = {k: 100.0 * float(np.mean(ranks <= k)) for k in RECALL_AT}
    metrics = {f"{direction}/R@{k}": value for k, value in recall.items()}
    metrics[f"{direction}/MdR"] = float(np.median(ranks))
    metrics[f"{direction}/MnR"] = float(np.mean(ranks))
    metrics[f"{direction}/Geom"] = float(np.cbrt(recall[1] * recall[5] * recall[10]))
    return metrics


def twin_accuracy(
    sim_QV: Similarities, twin_of_video: Assignment, video_of_query: Assignment | None = None
) -> float | None:
    """Return the percentage of queries that score their own video above its twin; a tie counts half.

    A single frame cannot distinguish a video from its twin (reversed motion), so a model without temporal information
    scores 50.

    Args:
        sim_QV: similarities [Q, V].
        twin_of_video: for each video the column of its twin, -1 for none.
        video_of_query: as retrieval_metrics.

    Returns:
        Percent over the queries whose video has a twin; None where there is none.

    Raises:
        UserError: as retrieval_metrics; a twin outside the gallery or a video that is its own twin.
    """
    rows, own = assigned_rows(sim_QV, video_of_query)
    twin = _checked_twins(twin_of_video, sim_QV.shape[1])
    keep = twin[own] >= 0
    if not keep.any():
        return None
    points = 0.0
    for chunk_KV, own_K in chunks(sim_QV, rows[keep], own[keep]):
        twin_K = torch.as_tensor(twin, device=chunk_KV.device)[own_K]
        difference = chunk_KV.gather(1, own_K[:, None]) - chunk_KV.gather(1, twin_K[:, None])
        points += float((difference > 0).sum()) + 0.5 * float((difference == 0).sum())
    return 100.0 * points / int(keep.sum())


def one_frame_ceiling(
    sim_QV: Similarities, twin_of_video: Assignment, video_of_query: Assignment | None = None
) -> float:
    """Return the best text-to-video R@1 (percent) that a model with one frame per clip can reach on average.

    Twins have the same frames, so it ranks the right one of the two first at most half of the time; every other query
    may be a hit.

    Args:
        sim_QV: similarities [Q, V]; only the shape is used.
        twin_of_video: as twin_accuracy.
        video_of_query: as retrieval_metrics.

    Raises:
        UserError: as twin_accuracy.
    """
    _, own = assigned_rows(sim_QV, video_of_query)
    twin = _checked_twins(twin_of_video, sim_QV.shape[1])
    return 100.0 - 50.0 * float(np.mean(twin[own] >= 0))


def _checked_twins(twin_of_video: Assignment, videos: int) -> np.ndarray:
    """The column of each video's twin, int64 [videos], -1 for none."""
    twin = _whole_numbers(twin_of_video, "twin_of_video")
    if len(twin) != videos or twin.min() < -1 or twin.max() >= videos or bool((twin == np.arange(videos)).any()):
        raise UserError(
            f"twin_of_video: got {len(twin)} values for {videos} videos; allowed: for each the column of another, or -1"
        )
    return twin


def chunks(sim_QV: Similarities, rows: np.ndarray, own: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the used rows of the matrix in chunks, with the columns of their videos.

    Yields:
        (similarities [K, V], own columns [K] int64), on the matrix's device.
    """
    size = max(1, CHUNK_ELEMENTS // max(1, sim_QV.shape[1]))
    whole = len(rows) == sim_QV.shape[0]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        picked: Any = slice(int(part[0]), int(part[-1]) + 1) if whole else part
        if isinstance(sim_QV, Tensor):
            chunk_KV = sim_QV[picked].detach()
        else:
            chunk_KV = torch.from_numpy(np.array(sim_QV[picked]))
        yield chunk_KV, torch.as_tensor(own[start : start + size], device=chunk_KV.device)


def own_maximum(sim_QV: Similarities, rows: np.ndarray, own: np.ndarray) -> Tensor:
    """Each video's best similarity among its own queries [V]; -inf (the type's lowest) for a video without a query.

    Raises:
        UserError: a similarity is NaN.
    """
    best_V: Tensor | None = None
    for chunk_KV, own_K in chunks(sim_QV, rows, own):
        if chunk_KV.is_floating_point() and bool(torch.isnan(chunk_KV).any()):
            raise UserError("similarities: got NaN; allowed: numbers (did a clip or the model produce NaN?)")
        if best_V is None:
            best_V = chunk_KV.new_full((chunk_KV.shape[1],), lowest_value(chunk_KV.dtype))
        best_V.scatter_reduce_(0, own_K, chunk_KV.gather(1, own_K[:, None])[:, 0], "amax")
    assert best_V is not None, "assigned_rows lets no empty matrix through"
    return best_V


def lowest_value(dtype: torch.dtype) -> float | int:
    """The lowest value of this type."""
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _mean_rank(above: Tensor, equal: Tensor) -> Tensor:
    """Mean rank, from 1, of an entry with `above` larger entries and `equal` equal ones (including itself)."""
    return above.double() + (equal.double() + 1) / 2


def assigned_rows(sim_QV: Similarities, video_of_query: Assignment | None) -> tuple[np.ndarray, np.ndarray]:
    """Check a matrix and its assignment.

    Returns:
        (indices of the rows with a caption, the column of each one's video), int64.

    Raises:
        UserError: as retrieval_metrics, except for NaN.
    """
    if not isinstance(sim_QV, (Tensor, np.ndarray)) or sim_QV.ndim != 2 or 0 in sim_QV.shape:
        got = str(list(sim_QV.shape)) if isinstance(sim_QV, (Tensor, np.ndarray)) else type(sim_QV).__name__
        raise UserError(f"similarities: got {got}; allowed: a numpy or torch matrix [Q, V] with Q, V >= 1")
    queries, videos = sim_QV.shape
    if video_of_query is None:
        if queries != videos:
            raise UserError(
                f"video_of_query: got none for {queries} queries and {videos} videos; allowed: none only where row i "
                "belongs to column i"
            )
        return np.arange(queries), np.arange(queries)
    own = _whole_numbers(video_of_query, "video_of_query")
    if len(own) != queries or own.min() < -1 or own.max() >= videos:
        got = f"{len(own)} values from {own.min()} to {own.max()}" if len(own) else "no values"
        raise UserError(
            f"video_of_query: got {got}; allowed: {queries} values, one a query, "
            f"from 0 to {videos - 1} (-1: no caption)"
        )
    rows = np.flatnonzero(own >= 0)
    if not len(rows):
        raise UserError("video_of_query: got -1 for every query; allowed: at least one query with a video")
    return rows, own[rows]


def _whole_numbers(values: Assignment, field: str) -> np.ndarray:
    """A one-dimensional int64 array."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{field}: got {array.dtype} of shape {list(array.shape)}; allowed: a list of whole numbers")
    return array.astype(np.int64)
