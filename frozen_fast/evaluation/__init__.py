"""Retrieval metrics, protocols and re-ranking, computed from embeddings or similarities."""

from frozen_fast.evaluation.metrics import (
    one_frame_ceiling,
    retrieval_metrics,
    retrieval_ranks,
    similarity,
    twin_accuracy,
)
from frozen_fast.evaluation.protocols import PROTOCOLS, choose_protocol, queries, v2t_max_over_captions
from frozen_fast.evaluation.rerank import Reranking, dual_softmax, qb_norm, reranked_metrics

__all__ = [
    "PROTOCOLS",
    "Reranking",
    "choose_protocol",
    "dual_softmax",
    "one_frame_ceiling",
    "qb_norm",
    "queries",
    "reranked_metrics",
    "retrieval_metrics",
    "retrieval_ranks",
    "similarity",
    "twin_accuracy",
    "v2t_max_over_captions",
]
