"""Retrieval on held-out clips: embed their windows, average per clip, rank. Exact on any number of processes.

Axis letters: N windows, T frames, C channels, H and W pixels, D width, Q text queries, V gallery videos.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frozen_fast.data import BadClip, EvaluationLoader, Source
from frozen_fast.evaluation import (
    one_frame_ceiling,
    queries,
    retrieval_metrics,
    similarity,
    twin_accuracy,
    v2t_max_over_captions,
)
from frozen_fast.models import DualEncoder
from frozen_fast.training.parallel import Parallel
from frozen_fast.training.signals import stop_explains

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of one source gave.

    Attributes:
        rows: entries of metrics.json, one per protocol, without step and stage.
        bad_clips: clips left out of the gallery (policy skip), over all ranks.
    """

    rows: list[Row]
    bad_clips: list[BadClip]


@torch.no_grad()
def evaluate_source(
    model: DualEncoder,
    source: Source,
    loader: EvaluationLoader,
    parallel: Parallel,
    *,
    frames: int,
    protocol: str = "auto",
    batch_size: int = 32,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on one source; every rank embeds its own clips and captions, then all hold the same result.

    Args:
        model: on its device; put into eval mode and back.
        source: the gallery and its captions.
        loader: this rank's windows of the source.
        parallel: ranks and autocast.
        frames: frames per window, for the record.
        protocol: evaluation.protocol of the config.
        batch_size: windows per forward pass, for the captions.
        stop_asked: tells that this process was told to stop.

    Returns:
        The result, or None when any rank was told to stop.

    Raises:
        UserError: a clip cannot be read under policy error, or there is nothing to rank; on every rank.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    try:
        with parallel.together():
            sums, counts = _embed_windows(model, loader, parallel, stop_asked)
        stopped, _ = parallel.agree(stop=stop_asked())
        if stopped:
            return None
        clips, bad_clips = _gather_clips(sums, counts, loader.dropped, parallel)
        with parallel.together():
            kept = sorted(clips)
            video_VD = torch.stack([clips[index] for index in kept]) if kept else torch.empty(0, 1)
            texts, video_of_query, name = _queries(source, kept, protocol)
            own_rows = _embed_texts(model, texts[parallel.rank :: parallel.world_size], parallel, batch_size)
        text_QD = _interleave(parallel.gather_objects(own_rows), len(texts))
        rows: list[Row] = []
        with parallel.together():
            if parallel.is_main:
                rows = _rows(text_QD, video_VD, video_of_query, _twins(source, kept), name)
        rows = parallel.gather_objects(rows)[0]
        base = {
            "frames": frames,
            "source": source.name,
            "windows": sum(parallel.gather_objects(sum(counts.values()))),
            "num_queries": len(texts),
            "num_videos": len(kept),
            "bad_clips": len(bad_clips),
            "seconds": time.perf_counter() - began,
        }
        return Evaluation([{**base, **row} for row in rows], bad_clips)
    finally:
        model.train(training)


def _embed_windows(
    model: DualEncoder, loader: EvaluationLoader, parallel: Parallel, stop_asked: Callable[[], bool]
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Sums of this rank's window embeddings per clip (not normalised, fp32, CPU), and how many windows each has."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    try:
        for batch in loader.batches():
            if stop_asked():
                break
            with parallel.autocast():
                rows_ND = model.encode_video(batch.windows_NTCHW, normalize=False)
            for index, row_D in zip(batch.clip_indices, rows_ND.float().cpu(), strict=True):
                sums[index] = sums[index] + row_D if index in sums else row_D
                counts[index] = counts.get(index, 0) + 1
    except Exception as error:
        if not stop_explains(error, stop_asked):
            raise
    finally:
        loader.close()
    return sums, counts


def _gather_clips(
    sums: dict[int, Tensor], counts: dict[int, int], dropped: dict[int, BadClip], parallel: Parallel
) -> tuple[dict[int, Tensor], list[BadClip]]:
    """Mean embedding per clip of all ranks, without the dropped clips, and the dropped ones in order."""
    own = {index: total / counts[index] for index, total in sums.items() if index not in dropped}
    clips: dict[int, Tensor] = {}
    bad: dict[int, BadClip] = {}
    for rank_clips, rank_bad in parallel.gather_objects((own, dict(dropped))):
        assert not clips.keys() & rank_clips.keys(), "a clip was embedded on two ranks"
        clips.update(rank_clips)
        bad.update(rank_bad)
    return clips, [bad[index] for index in sorted(bad)]


def _queries(source: Source, kept: Sequence[int], protocol: str) -> tuple[list[str], list[int], str]:
    """Texts, the gallery row of each, and the protocol's name; a source read as paragraphs says so."""
    captions = [source.caption_rule.evaluation(source.clips[index].captions) for index in kept]
    if protocol == "auto" and source.caption_rule.mode == "paragraph":
        protocol = "paragraph"
    return queries(captions, protocol)


def _embed_texts(model: DualEncoder, texts: Sequence[str], parallel: Parallel, batch_size: int) -> Tensor:
    """Embeddings of some captions (not normalised, fp32, CPU)."""
    rows = []
    for first in range(0, len(texts), batch_size):
        with parallel.autocast():
            rows.append(model.encode_text(list(texts[first : first + batch_size]), normalize=False).float().cpu())
    return torch.cat(rows) if rows else torch.empty(0)


def _interleave(parts: Sequence[Tensor], count: int) -> Tensor:
    """Put back together what was dealt out as texts[rank::world_size]."""
    whole = torch.empty(count, parts[0].shape[-1])
    for rank, part in enumerate(parts):
        if len(part):
            whole[rank :: len(parts)] = part
    return whole


def _twins(source: Source, kept: Sequence[int]) -> list[int]:
    """For each gallery row the row of the clip that one frame cannot tell apart from it, -1 for none."""
    clips = [source.clips[index] for index in kept]
    row_of = {clip.id: row for row, clip in enumerate(clips)}
    return [-1 if clip.twin is None else row_of.get(clip.twin, -1) for clip in clips]


def _rows(
    text_QD: Tensor, video_VD: Tensor, video_of_query: list[int], twins: list[int], protocol: str
) -> list[Row]:
    """Metrics per protocol; several captions also under the protocol that takes the maximum over a video's captions."""
    sim_QV = similarity(text_QD, video_VD)
    metrics: dict[str, float] = dict(retrieval_metrics(sim_QV, video_of_query))
    if any(twin >= 0 for twin in twins):
        accuracy = twin_accuracy(sim_QV, twins, video_of_query)
        if accuracy is not None:
            metrics["twin_accuracy"] = accuracy
            metrics["one_frame_ceiling"] = one_frame_ceiling(sim_QV, twins, video_of_query)
    rows: list[Row] = [{"protocol": protocol, "metrics": metrics}]
    if protocol == "several_captions":
        second = v2t_max_over_captions(sim_QV, video_of_query)
        rows.append({"protocol": "v2t_max_over_captions", "metrics": second})
    return rows
