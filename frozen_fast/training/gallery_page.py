"""The data of the retrieval page, from an evaluation's similarities.

Axis letters: Q text queries, V gallery videos, M experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from frozen_fast.data import Clip
from frozen_fast.models.experts.expert_model import ExpertModel
from frozen_fast.models.retrieval_model import Features, RetrievalModel
from frozen_fast.report.gallery import GalleryClip, GalleryPage, GalleryQuery

FOUND = 5
EXTREMES = 5
"""Number of best and of worst queries that the page adds to the random ones, and that the report names."""
HEAD = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MdR")
_SEED = 0


def gallery_page(
    model: RetrievalModel,
    source: str,
    clips: Sequence[Clip],
    texts: Sequence[str],
    video_of_query: Sequence[int],
    sim_QV: Tensor,
    text: Features,
    metrics: Mapping[str, float],
    *,
    queries: int,
) -> GalleryPage:
    """Build the page of randomly drawn queries (the same in every evaluation of a source) and the best and worst ones.

    Args:
        model: an expert model's mixture weights are shown.
        source: name of the source.
        clips: the gallery, in the order of the similarities' columns.
        texts: the queries.
        video_of_query: the column of each query's own clip.
        sim_QV: similarities.
        text: features of the queries.
        metrics: shown at the top of the page.
        queries: number of queries to draw; all if there are fewer.
    """
    columns_Q = torch.tensor(video_of_query)
    own_Q1 = sim_QV.gather(1, columns_Q[:, None])
    ranks_Q = (sim_QV > own_Q1).sum(1) + ((sim_QV == own_Q1).sum(1) + 1) / 2
    lead_Q = (own_Q1 - sim_QV.scatter(1, columns_Q[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]
    order = sorted(range(len(texts)), key=lambda query: (ranks_Q[query].item(), -lead_Q[query].item()))
    best, worst = order[:EXTREMES], order[::-1][:EXTREMES]
    drawn = np.random.default_rng(_SEED).permutation(len(texts))[:queries].tolist()
    made = {
        query: _query(
            model, clips, texts[query], video_of_query[query], ranks_Q[query].item(), sim_QV[query], text, query
        )
        for query in dict.fromkeys([*drawn, *best, *worst])
    }
    return GalleryPage(
        source=source,
        numbers=tuple((name, metrics[name]) for name in HEAD if name in metrics),
        all_queries=len(texts),
        queries=tuple(made.values()),
        best=tuple(made[query] for query in best),
        worst=tuple(made[query] for query in worst),
    )


def _query(
    model: RetrievalModel,
    clips: Sequence[Clip],
    caption: str,
    own: int,
    rank: float,
    sim_V: Tensor,
    text: Features,
    query: int,
) -> GalleryQuery:
    """Build the entry of a query: its own clip, the clips ranked first, and the mixture weights."""
    first = torch.topk(sim_V, min(FOUND, len(sim_V))).indices.tolist()
    found = [GalleryClip(clips[column], float(sim_V[column]), column == own) for column in first]
    own_clip = GalleryClip(clips[own], float(sim_V[own]), True)
    return GalleryQuery(caption, rank, own_clip, tuple(found), _weights(model, text, query))


def _weights(model: RetrievalModel, text: Features, query: int) -> tuple[tuple[str, float], ...]:
    """Return a caption's mixture weights by expert; empty for other models."""
    weights = text.get("weights")
    if not isinstance(model, ExpertModel) or weights is None or weights.shape[1] != len(model.sizes.names):
        return ()
    return tuple(zip(model.sizes.names, weights[query].tolist(), strict=True))
