"""Evaluation protocols: the queries of a set, and the rankings that metrics summarise.

plain: one caption per clip, row i belongs to column i.
several_captions: every caption is a query; v2t uses the best rank of a clip's own captions.
paragraph: a clip's captions joined into one query (DiDeMo, ActivityNet).
v2t_max_over_captions: CLIP2Video's second protocol; its v2t differs from R@5 on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from frozen_fast.errors import UserError, unknown_name
from frozen_fast.evaluation.metrics import (
    Assignment,
    Similarities,
    assigned_rows,
    chunks,
    lowest_value,
    own_maximum,
    retrieval_metrics,
    retrieval_ranks,
    summary,
)

PROTOCOLS = ("plain", "several_captions", "paragraph")
"""Protocols that evaluation.protocol selects."""


def choose_protocol(captions: Sequence[Sequence[str]]) -> str:
    """The protocol of `auto`: plain if no clip has more than one caption, otherwise several_captions."""
    return "several_captions" if any(len(own) > 1 for own in captions) else "plain"


def queries(captions: Sequence[Sequence[str]], protocol: str = "auto") -> tuple[list[str], list[int], str]:
    """Queries of an evaluation set.

    Args:
        captions: the captions of each clip, in gallery order; a clip may have none.
        protocol: auto, plain (the first caption), several_captions (all), or paragraph (all, joined by a space).

    Returns:
        (texts, video_of_query, the protocol's own name). A clip without captions has no query and is part of
        the gallery.

    Raises:
        UserError: an unknown protocol, or no caption at all.
    """
    if protocol == "auto":
        protocol = choose_protocol(captions)
    if protocol not in PROTOCOLS:
        raise unknown_name("evaluation.protocol", protocol, ("auto", *PROTOCOLS))
    texts: list[str] = []
    video_of_query: list[int] = []
    for video, own in enumerate(captions):
        if protocol == "paragraph":
            own = [" ".join(own)] if own else []
        elif protocol == "plain":
            own = own[:1]
        texts.extend(own)
        video_of_query.extend([video] * len(own))
    if not texts:
        raise UserError(f"evaluation: got {len(captions)} clips without a caption; allowed: at least one caption")
    return texts, video_of_query, protocol


def v2t_max_over_captions(sim_QV: Similarities, video_of_query: Assignment | None = None) -> dict[str, float]:
    """CLIP2Video's protocol for several captions: v2t ranks videos by their best caption.

    t2v is that of retrieval_metrics. v2t ranks, for each video, all videos by the best similarity of their captions
    (a V x V ranking), so R@1 equals retrieval_metrics and R@5, R@10 and the ranks are better. Arguments, treatment of
    missing captions and errors as retrieval_metrics; videos without a caption are excluded from v2t.
    """
    metrics = retrieval_metrics(sim_QV, video_of_query)
    rows, own = assigned_rows(sim_QV, video_of_query)
    own_best_V = own_maximum(sim_QV, rows, own)
    # best_UV[u, v]: the best similarity of video u's captions with video v.
    best_UV = own_best_V.new_full((len(own_best_V), len(own_best_V)), lowest_value(own_best_V.dtype))
    for chunk_KV, own_K in chunks(sim_QV, rows, own):
        best_UV.scatter_reduce_(0, own_K[:, None].expand_as(chunk_KV), chunk_KV, "amax")
    captioned = torch.from_numpy(np.unique(own)).to(best_UV.device)
    ranks, _ = retrieval_ranks(best_UV[captioned][:, captioned].T)
    return {**metrics, **summary(ranks, "v2t")}
