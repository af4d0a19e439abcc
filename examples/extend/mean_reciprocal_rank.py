"""A metric from outside the tree: the mean reciprocal rank in both directions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from frozen_fast.evaluation import retrieval_ranks
from frozen_fast.evaluation.metric_table import MetricFamily


def mean_reciprocal_rank(sim_QV: Tensor, video_of_query: Sequence[int]) -> dict[str, float]:
    """100 times the mean of 1 / rank, text to video and video to text."""
    t2v, v2t = retrieval_ranks(sim_QV, video_of_query)
    return {"t2v/MRR": 100.0 * float((1 / t2v).mean()), "v2t/MRR": 100.0 * float((1 / v2t).mean())}


MRR = MetricFamily(compute=mean_reciprocal_rank, higher_is_better={"t2v/MRR": True, "v2t/MRR": True})
