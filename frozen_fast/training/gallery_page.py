"""What the retrieval page shows, from an evaluation's similarities.

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
    """The page of some queries, drawn once and alike in every evaluation of a source.

    Args:
        model: an expert model's mixture weights are shown.
        source: its name.
        clips: the gallery, in the order of the similarities' columns.
        texts: the queries.
        video_of_query: the column of each query's own clip.
        sim_QV: similarities.
        text: features of the queries.
        metrics: for the page's head.
        queries: how many are shown; all where there are fewer.
    """
    drawn = np.random.default_rng(_SEED).permutation(len(texts))[:queries].tolist()
    shown = []
    for query in drawn:
        row_V, own = sim_QV[query], video_of_query[query]
        above, equal = int((row_V > row_V[own]).sum()), int((row_V == row_V[own]).sum())
        first = torch.topk(row_V, min(FOUND, len(row_V))).indices.tolist()
        found = tuple(_clip(clips[column], float(row_V[column]), column == own) for column in first)
        own_clip = _clip(clips[own], float(row_V[own]), True)
        shown.append(GalleryQuery(texts[query], above + (equal + 1) / 2, own_clip, found, _weights(model, text, query)))
    numbers = tuple((name, metrics[name]) for name in HEAD if name in metrics)
    return GalleryPage(f"Retrieval on {source}: {len(shown)} of {len(texts)} queries", numbers, tuple(shown))


def _clip(clip: Clip, similarity: float, is_own: bool) -> GalleryClip:
    return GalleryClip(
        clip.id, clip.path, tuple(clip.captions), similarity, is_own, clip.start_seconds, clip.end_seconds
    )


def _weights(model: RetrievalModel, text: Features, query: int) -> tuple[tuple[str, float], ...]:
    """A caption's mixture weights by expert; none for a model without."""
    weights = text.get("weights")
    if not isinstance(model, ExpertModel) or weights is None or weights.shape[1] != len(model.sizes.names):
        return ()
    return tuple(zip(model.sizes.names, weights[query].tolist(), strict=True))
