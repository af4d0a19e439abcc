"""Re-ranking methods, which use more than one query. They are reported separately.

Axis letters: Q text queries, V gallery videos, B queries of a querybank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frozen_fast.errors import UserError, unknown_name
from frozen_fast.evaluation.metrics import retrieval_metrics

RERANKINGS = ("dual_softmax", "qb_norm")


def dual_softmax(sim_QV: Tensor, scale: float = 100.0, direction: str = "t2v") -> Tensor:
    """Weight similarities by a softmax over the other side of the test set (dual softmax, CAMoE, 2021).

    The result of a query depends on all other queries, so it is not comparable with a ranking of single queries.

    Args:
        sim_QV: similarities [Q, V].
        scale: factor on the similarities inside the softmax (100 suits cosines).
        direction: t2v normalises over the queries of a video, v2t over the videos of a query.

    Returns:
        [Q, V] in at least fp32, for one direction's metrics only.

    Raises:
        UserError: an unknown direction or a scale that is not above 0.
    """
    axes = {"t2v": 0, "v2t": 1}
    if direction not in axes:
        raise unknown_name("direction", direction, axes)
    if not scale > 0:
        raise UserError(f"scale: got {scale}; allowed: above 0")
    sim_QV = sim_QV if sim_QV.dtype == torch.float64 else sim_QV.float()
    return sim_QV * torch.softmax(sim_QV * scale, dim=axes[direction])


def qb_norm(sim_QV: Tensor, sim_BV: Tensor, beta: float = 20.0, k: int = 1) -> Tensor:
    """Normalise similarities by a querybank: the dynamic inverted softmax of QB-Norm (Bogolin et al., CVPR 2022).

    A video is a hub if it is among the k nearest videos of a query of the bank. A query whose nearest video is a hub
    gets exp(beta * s_qv) / sum_b exp(beta * s_bv) for every video v; other queries keep their similarities.

    Args:
        sim_QV: similarities of the test queries.
        sim_BV: similarities of the querybank (captions of training clips) to the same videos.
        beta: inverse temperature; the paper uses 20 for cosines.
        k: nearest videos of a query of the bank that count as hubs; the paper uses 1.

    Returns:
        [Q, V] in at least fp32, for ranking within a row only; values of different rows are not comparable.

    Raises:
        UserError: the galleries differ in size, the bank is empty, or beta or k is out of range.
    """
    if sim_BV.ndim != 2 or not len(sim_BV) or sim_BV.shape[1] != sim_QV.shape[1]:
        got = f"{list(sim_BV.shape)} beside {list(sim_QV.shape)}"
        raise UserError(f"querybank: got similarities {got}; allowed: [B, V] with B >= 1 and the gallery's V")
    if not beta > 0 or not 1 <= k <= sim_QV.shape[1]:
        raise UserError(f"beta, k: got {beta}, {k}; allowed: beta above 0, k from 1 to {sim_QV.shape[1]}")
    sim_QV = sim_QV if sim_QV.dtype == torch.float64 else sim_QV.float()
    hub_V = torch.zeros(sim_QV.shape[1], dtype=torch.bool, device=sim_QV.device)
    hub_V[sim_BV.topk(k, dim=1).indices.flatten()] = True
    bank_V = torch.logsumexp(beta * sim_BV.to(sim_QV.dtype), dim=0)
    normalised_QV = torch.exp(beta * sim_QV - bank_V)
    return torch.where(hub_V[sim_QV.argmax(dim=1)][:, None], normalised_QV, sim_QV)


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """The re-ranking methods of an evaluation.

    Attributes:
        names: of RERANKINGS.
        scale: of dual_softmax.
        querybank: captions of training clips, for qb_norm.
        beta: of qb_norm.
    """

    names: tuple[str, ...]
    scale: float = 100.0
    querybank: tuple[str, ...] = ()
    beta: float = 20.0


def reranked_metrics(
    wanted: Reranking, sim_QV: Tensor, video_of_query: Sequence[int], querybank_BV: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Compute retrieval metrics for each re-ranking method.

    Args:
        wanted: which.
        sim_QV: similarities.
        video_of_query: as retrieval_metrics.
        querybank_BV: similarities of the querybank; qb_norm needs it.

    Returns:
        Name -> metrics as retrieval_metrics; qb_norm has t2v only, because its bank contains captions.

    Raises:
        UserError: an unknown name, or qb_norm without a querybank.
    """
    found = {}
    for name in wanted.names:
        if name not in RERANKINGS:
            raise unknown_name("evaluation.rerank", name, RERANKINGS)
        if name == "dual_softmax":
            t2v = retrieval_metrics(dual_softmax(sim_QV, wanted.scale, "t2v"), video_of_query)
            v2t = retrieval_metrics(dual_softmax(sim_QV, wanted.scale, "v2t"), video_of_query)
            found[name] = {key: value for key, value in t2v.items() if key.startswith("t2v/")}
            found[name] |= {key: value for key, value in v2t.items() if key.startswith("v2t/")}
        else:
            if querybank_BV is None:
                allowed = "captions of training clips (data.sources[0])"
                raise UserError(f"evaluation.rerank: got 'qb_norm' without a querybank; allowed: {allowed}")
            metrics = retrieval_metrics(qb_norm(sim_QV, querybank_BV, wanted.beta), video_of_query)
            found[name] = {key: value for key, value in metrics.items() if key.startswith("t2v/")}
    return found
