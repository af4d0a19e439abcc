"""Evaluates retrieval on held-out clips: encode windows, merge them per clip, rank. Exact on any number of processes.

Axis letters: Q text queries, V gallery videos.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from frozen_fast.config import ExperimentConfig
from frozen_fast.data import BadClip, BadClipLedger, Source, read_sources
from frozen_fast.data.load.feature_loader import FeatureEvaluationLoader
from frozen_fast.errors import UserError
from frozen_fast.evaluation import (
    Reranking,
    one_frame_ceiling,
    queries,
    reranked_metrics,
    twin_accuracy,
    v2t_max_over_captions,
)
from frozen_fast.evaluation.classification import Classification, average_prompts, classify, prompts_of
from frozen_fast.evaluation.linear_head import LinearHead, fit_linear_head
from frozen_fast.evaluation.metric_table import compute_metrics
from frozen_fast.losses import RetrievalLoss, batch_loss, build_loss
from frozen_fast.models.retrieval_model import Features, RetrievalModel, TextInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.report.gallery import GalleryPage
from frozen_fast.training.clip_cache import ClipCache, open_clip_cache
from frozen_fast.training.encode import AnyEvaluationLoader, class_numbers, encode_clips, encode_texts, flat
from frozen_fast.training.gallery_page import gallery_page
from frozen_fast.training.parts import build_evaluation_loader, build_reranking, matching_training_source
from frozen_fast.training.signals import StopRequest

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation of one source.

    Attributes:
        rows: entries of metrics.json, one per protocol, without step and stage; "loss" is the validation loss.
        bad_clips: clips left out of the gallery (policy skip), over all ranks.
        gallery: the retrieval page, on rank 0 if one is requested.
    """

    rows: list[Row]
    bad_clips: list[BadClip]
    gallery: GalleryPage | None = None


def evaluate_with(
    config: ExperimentConfig,
    model: RetrievalModel,
    source: Source,
    parallel: Parallel,
    *,
    frames: int,
    loss_batch_size: int,
    gallery: bool,
    stop: StopRequest,
) -> Evaluation | None:
    """Evaluate a model on one source as the config says; returns None if a stop was requested.

    Args:
        config: its evaluation and data.decode sections are used.
        model: on its device.
        source: gallery and captions.
        parallel: ranks.
        frames: frames per window if evaluation.frames is null; images have one. If the model has learned fewer frames
            than evaluation.frames so far, it gets as many as it has learned.
        loss_batch_size: batch size of the validation loss.
        gallery: make the retrieval page of evaluation.gallery.
        stop: this process's stop request.

    Raises:
        UserError: as evaluate_source, and if more clips than data.decode.max_bad_share cannot be read.
    """
    loader, cache, frames = evaluation_loader(config, model, source, parallel, frames)
    head = None
    if config.evaluation.linear_head and source.classes:
        head = _fit_head(config, model, source, parallel, frames, stop)
        if head is None:
            return None
    result = evaluate_source(
        model,
        source,
        loader,
        parallel,
        frames=frames,
        protocol=config.evaluation.protocol,
        metrics=config.evaluation.metrics,
        batch_size=config.evaluation.batch_size,
        loss=build_loss(config.loss),
        loss_batch_size=loss_batch_size,
        rerank=build_reranking(config),
        prompts=config.evaluation.prompts,
        gallery=config.evaluation.gallery if gallery else 0,
        head=head,
        cache=cache,
        stop_asked=lambda: stop.asked,
    )
    if result is not None:
        check_bad_share(config, source, result.bad_clips)
    return result


def evaluation_loader(
    config: ExperimentConfig, model: RetrievalModel, source: Source, parallel: Parallel, frames: int
) -> tuple[AnyEvaluationLoader, ClipCache | None, int]:
    """Return this rank's loader of a source's windows, its cache, and the number of frames per window.

    The arguments are those of evaluate_with.
    """
    wanted = min(config.evaluation.frames or frames, model.learned_frames)
    frames = 1 if source.kind == "image" else wanted
    with parallel.together():
        loader = build_evaluation_loader(
            config, source, model, parallel.device, frames=frames, rank=parallel.rank, world_size=parallel.world_size
        )
        cache = open_clip_cache(config, model, source, parallel, frames)
    return loader, cache, frames


def check_bad_share(config: ExperimentConfig, source: Source, bad_clips: list[BadClip]) -> None:
    """Refuse an evaluation in which more clips than data.decode.max_bad_share could not be read.

    Raises:
        UserError: naming the share.
    """
    ledger = BadClipLedger(None, config.data.decode.max_bad_share)
    ledger.record(0, len(source) - len(bad_clips), bad_clips)
    ledger.check(final=True)


@torch.no_grad()
def evaluate_source(
    model: RetrievalModel,
    source: Source,
    loader: AnyEvaluationLoader,
    parallel: Parallel,
    *,
    frames: int,
    protocol: str = "auto",
    metrics: Sequence[str] = ("retrieval",),
    batch_size: int = 32,
    loss: RetrievalLoss | None = None,
    loss_batch_size: int = 32,
    rerank: Reranking | None = None,
    prompts: Sequence[str] = (),
    gallery: int = 0,
    head: LinearHead | None = None,
    cache: ClipCache | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on one source. Every rank encodes its own clips and captions; all ranks return the same result.

    Args:
        model: on its device; set to eval mode during the evaluation.
        source: the gallery and its captions.
        loader: this rank's windows of the source.
        parallel: ranks and autocast.
        frames: frames per window, for the record.
        protocol: evaluation.protocol of the config.
        metrics: names in the table extensions.metrics.
        batch_size: windows per forward pass, for the captions.
        loss: computes the validation loss; None: no validation loss.
        loss_batch_size: batch size of the validation loss.
        rerank: re-rankings; the first row contains their metrics under "reranked", beside its "metrics".
        prompts: templates for the class names of a source with classes; the first row then contains "classification".
        gallery: queries of the retrieval page, 0: no page.
        head: a linear layer from the model's clip features to the source's classes; the first row then contains
            "linear_head".
        cache: features of clips that were encoded before.
        stop_asked: returns whether this process was told to stop.

    Returns:
        The result, or None when any rank was told to stop.

    Raises:
        UserError: a clip cannot be read under policy error, or there is nothing to rank; on every rank.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    try:
        clips = encode_clips(model, loader, parallel, stop_asked, cache)
        if clips is None:
            return None
        with parallel.together():
            kept = clips.kept
            texts, video_of_query, name = _queries(source, kept, protocol)
            inputs = _text_inputs(loader, texts, [kept[video] for video in video_of_query], name)
            own_queries = range(parallel.rank, len(texts), parallel.world_size)
            own_texts = encode_texts(model, inputs, own_queries, parallel, batch_size)
        text = _interleave(parallel.gather_objects(own_texts), len(texts))
        rows: list[Row] = []
        page: GalleryPage | None = None
        with parallel.together():
            if parallel.is_main:
                video = clips.stacked()
                sim_QV = similarity_in_blocks(model, text, video)
                rows = _rows(sim_QV, video_of_query, _twins(source, kept), name, metrics)
                if gallery:
                    shown, main = [source.clips[index] for index in kept], rows[0]["metrics"]
                    page = gallery_page(
                        model, source.name, shown, texts, video_of_query, sim_QV, text, main, queries=gallery
                    )
                if loss is not None:
                    value = validation_loss(model, loss, text, video, video_of_query, loss_batch_size)
                    rows = [{**row, "loss": value, "loss_batch_size": loss_batch_size} for row in rows]
                if rerank is not None:
                    bank_BV = _querybank_similarities(model, rerank, video, parallel, batch_size)
                    rows[0]["reranked"] = reranked_metrics(rerank, sim_QV, video_of_query, bank_BV)
                rows[0].update(_classifications(model, source, kept, video, prompts, head, parallel, batch_size))
        rows = parallel.gather_objects(rows)[0]
        base = {
            "frames": frames,
            "source": source.name,
            "windows": clips.num_windows,
            "num_queries": len(texts),
            "num_videos": len(kept),
            "bad_clips": len(clips.bad_clips),
            "seconds": time.perf_counter() - began,
        }
        return Evaluation([{**base, **row} for row in rows], clips.bad_clips, page)
    finally:
        model.train(training)


def _classifications(
    model: RetrievalModel,
    source: Source,
    kept: Sequence[int],
    video: Features,
    prompts: Sequence[str],
    head: LinearHead | None,
    parallel: Parallel,
    batch_size: int,
) -> Row:
    """Classify a source with classes by prompts and by a linear layer, if requested."""
    found: Row = {}
    if prompts and source.classes:
        found["classification"] = asdict(_classified(model, source, kept, prompts, video, parallel, batch_size))
    if head is not None:
        of_head = classify(head.logits(flat(video)), class_numbers(source, kept, source.classes), source.classes)
        found["linear_head"] = asdict(of_head)
    return found


def similarity_in_blocks(model: RetrievalModel, text: Features, video: Features, *, block: int = 1024) -> Tensor:
    """Compute the similarity of every caption and clip for ranking, in blocks on the model's device.

    Args:
        model: in eval mode.
        text: features of Q captions, on any device.
        video: features of V clips, on any device.
        block: number of captions and of clips in a block.

    Returns:
        sim_QV, fp32, on the CPU (4 * Q * V bytes).
    """
    captions, clips = len(next(iter(text.values()))), len(next(iter(video.values()), ()))
    sim_QV = torch.empty(captions, clips)
    columns = range(0, clips, block)
    for row in range(0, captions, block):
        rows = {name: tensor[row : row + block].to(model.device) for name, tensor in text.items()}
        for column in columns:
            part = {name: tensor[column : column + block].to(model.device) for name, tensor in video.items()}
            sim_QV[row : row + block, column : column + block] = model.pair_similarities(rows, part).mean(0).float()
    return sim_QV


def _queries(source: Source, kept: Sequence[int], protocol: str) -> tuple[list[str], list[int], str]:
    """Return the texts, the gallery row of each, and the name of the protocol."""
    captions = [source.caption_rule.evaluation(source.clips[index].captions) for index in kept]
    if protocol == "auto" and source.caption_rule.mode == "paragraph":
        protocol = "paragraph"
    return queries(captions, protocol)


def _text_inputs(
    loader: AnyEvaluationLoader, texts: Sequence[str], clip_of_query: Sequence[int], protocol: str
) -> Callable[[Sequence[int]], TextInput]:
    """Return a function from queries to the model's input: strings, or a feature store's tokens."""
    if isinstance(loader, FeatureEvaluationLoader):
        return loader.query_inputs(clip_of_query, protocol)
    return lambda queries: [texts[query] for query in queries]


def _interleave(parts: Sequence[Features], count: int) -> Features:
    """Restore the order of items that were distributed as texts[rank::world_size]."""
    whole = {name: tensor.new_empty(count, *tensor.shape[1:]) for name, tensor in parts[0].items()}
    for rank, part in enumerate(parts):
        for name, tensor in part.items():
            whole[name][rank :: len(parts)] = tensor
    return whole


def validation_loss(
    model: RetrievalModel,
    loss: RetrievalLoss,
    text: Features,
    video: Features,
    video_of_query: Sequence[int],
    batch_size: int,
) -> float:
    """Compute the training loss on held-out clips, by which the paper chooses epochs.

    Each clip is paired with its first caption. Batches have equal sizes near batch_size and are drawn at random once
    for the whole run, because neighbours in a list are often similar.

    Args:
        model: compares features.
        loss: as in training.
        text: caption features.
        video: clip features, merged over a clip's windows.
        video_of_query: the clip of each caption; every clip has one.
        batch_size: clips of a batch, whose captions are negatives for each other, as in training.

    Returns:
        The mean over clips.
    """
    clips = len(next(iter(video.values())))
    first_query = {video: query for query, video in reversed(list(enumerate(video_of_query)))}
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(0))
    parameters = {name: value.detach().cpu() for name, value in model.loss_parameters().items()}
    total = 0.0
    for batch in order.tensor_split(max(1, round(clips / batch_size))):
        captions = [first_query[clip] for clip in batch.tolist()]
        text_B = {name: tensor[captions] for name, tensor in text.items()}
        video_B = {name: tensor[batch] for name, tensor in video.items()}
        sim_KBB = model.pair_similarities(text_B, video_B)
        total += len(batch) * float(batch_loss(loss, sim_KBB, parameters))
    return total / clips


def _querybank_similarities(
    model: RetrievalModel, rerank: Reranking, video: Features, parallel: Parallel, batch_size: int
) -> Tensor | None:
    """Compute the similarities of the querybank's captions to the gallery [B, V]; None without a querybank."""
    if not rerank.querybank:
        return None
    bank = rerank.querybank
    text = encode_texts(model, lambda rows: [bank[row] for row in rows], range(len(bank)), parallel, batch_size)
    return similarity_in_blocks(model, text, video)


def _classified(
    model: RetrievalModel,
    source: Source,
    kept: Sequence[int],
    templates: Sequence[str],
    video: Features,
    parallel: Parallel,
    batch_size: int,
) -> Classification:
    """Classify the gallery's clips zero-shot, by prompts with the class names.

    Raises:
        UserError: a clip of the source has no class.
    """
    texts = prompts_of(source.classes, templates)
    text = encode_texts(model, lambda rows: [texts[row] for row in rows], range(len(texts)), parallel, batch_size)
    sim_CV = average_prompts(similarity_in_blocks(model, text, video), len(source.classes))
    return classify(sim_CV, class_numbers(source, kept, source.classes), source.classes)


@torch.no_grad()
def _fit_head(
    config: ExperimentConfig, model: RetrievalModel, source: Source, parallel: Parallel, frames: int, stop: StopRequest
) -> LinearHead | None:
    """Fit a linear head on the training split of an evaluation source; None if told to stop."""
    split = matching_training_source(config, source.name)
    with parallel.together():
        train = next(iter(read_sources([split]).values()))
        if unknown := sorted(set(train.classes) - set(source.classes)):
            wrong = f"source {source.name}: got class {unknown[0]!r} in training only"
            raise UserError(f"evaluation.linear_head: {wrong}; allowed: the test split's classes")
    loader, cache, _ = evaluation_loader(config, model, train, parallel, frames)
    training = model.training
    model.eval()
    try:
        clips = encode_clips(model, loader, parallel, lambda: stop.asked, cache)
        if clips is None:
            return None
        with parallel.together():
            return fit_linear_head(
                flat(clips.stacked()),
                class_numbers(train, clips.kept, source.classes),
                len(source.classes),
                label_smoothing=config.evaluation.linear_head_smoothing,
                weight_decay=config.evaluation.linear_head_decay,
            )
    finally:
        model.train(training)


def _twins(source: Source, kept: Sequence[int]) -> list[int]:
    """Return for each gallery row the row of its twin, which has the same frames in another order; -1: none."""
    clips = [source.clips[index] for index in kept]
    row_of = {clip.id: row for row, clip in enumerate(clips)}
    return [-1 if clip.twin is None else row_of.get(clip.twin, -1) for clip in clips]


def _rows(
    sim_QV: Tensor, video_of_query: list[int], twins: list[int], protocol: str, names: Sequence[str]
) -> list[Row]:
    """Compute metrics per protocol; with several captions per video, also for the maximum over a video's captions."""
    metrics = compute_metrics(names, sim_QV, video_of_query)
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
