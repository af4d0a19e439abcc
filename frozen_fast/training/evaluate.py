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

from frozen_fast.config import ExperimentConfig
from frozen_fast.data import BadClip, BadClipLedger, EvaluationLoader, Source
from frozen_fast.evaluation import (
    one_frame_ceiling,
    queries,
    retrieval_metrics,
    similarity,
    twin_accuracy,
    v2t_max_over_captions,
)
from frozen_fast.losses import contrastive_loss
from frozen_fast.models import DualEncoder
from frozen_fast.parallel.base import Parallel
from frozen_fast.training.parts import build_evaluation_loader
from frozen_fast.training.signals import StopRequest, stop_explains

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of one source gave.

    Attributes:
        rows: entries of metrics.json, one per protocol, without step and stage; "loss" is the validation loss.
        bad_clips: clips left out of the gallery (policy skip), over all ranks.
    """

    rows: list[Row]
    bad_clips: list[BadClip]


def evaluate_with(
    config: ExperimentConfig,
    model: DualEncoder,
    source: Source,
    parallel: Parallel,
    *,
    frames: int,
    loss_batch_size: int,
    stop: StopRequest,
) -> Evaluation | None:
    """Evaluate a model on one source as the config says; None when told to stop.

    Args:
        config: its evaluation and data.decode sections count.
        model: on its device.
        source: gallery and captions.
        parallel: ranks.
        frames: frames per window where evaluation.frames says none; pictures have one. A model that has learned fewer
            frames than evaluation.frames so far is shown those that it has learned.
        loss_batch_size: clips over which the validation loss is taken.
        stop: this process's wish to stop.

    Raises:
        UserError: as evaluate_source; and where more clips than data.decode.max_bad_share cannot be read.
    """
    wanted = min(config.evaluation.frames or frames, model.learned_frames)
    frames = 1 if source.kind == "image" else wanted
    with parallel.together():
        loader = build_evaluation_loader(
            config, source, model, parallel.device, frames=frames, rank=parallel.rank, world_size=parallel.world_size
        )
    result = evaluate_source(
        model,
        source,
        loader,
        parallel,
        frames=frames,
        protocol=config.evaluation.protocol,
        batch_size=config.evaluation.batch_size,
        loss_batch_size=loss_batch_size,
        temperature=config.loss.temperature,
        stop_asked=lambda: stop.asked,
    )
    if result is not None:
        ledger = BadClipLedger(None, config.data.decode.max_bad_share)
        ledger.record(0, len(source) - len(result.bad_clips), result.bad_clips)
        ledger.check(final=True)
    return result


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
    loss_batch_size: int = 32,
    temperature: float = 0.05,
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
        loss_batch_size: clips over which the validation loss is taken.
        temperature: of the validation loss.
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
                loss = validation_loss(text_QD, video_VD, video_of_query, loss_batch_size, temperature)
                rows = [{**row, "loss": loss, "loss_batch_size": loss_batch_size} for row in rows]
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


def validation_loss(
    text_QD: Tensor, video_VD: Tensor, video_of_query: Sequence[int], batch_size: int, temperature: float
) -> float:
    """The training loss on held-out clips: what the paper chooses epochs by.

    Each clip stands with the first of its captions, in batches of equal size, nearly batch_size, drawn once and for
    all: neighbours in a list are often alike.

    Args:
        text_QD: caption embeddings.
        video_VD: clip embeddings, the mean over a clip's windows.
        video_of_query: the clip of each caption; every clip has one.
        batch_size: clips whose captions are one another's negatives, as in training.
        temperature: as in training.

    Returns:
        The mean over clips of the symmetric loss, both directions summed.
    """
    clips = len(video_VD)
    first_query = {video: query for query, video in reversed(list(enumerate(video_of_query)))}
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for batch in order.tensor_split(max(1, round(clips / batch_size))):
        text_BD = text_QD[[first_query[video] for video in batch.tolist()]]
        total += len(batch) * float(contrastive_loss(video_VD[batch], text_BD, temperature))
    return total / clips


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
