"""`frozen-fast embed`: embeds a source into an index, on every process of a launch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_fast.common.logs import set_up_logging
from frozen_fast.config.schema import DecodeConfig
from frozen_fast.data import BadClip
from frozen_fast.errors import UserError
from frozen_fast.models.pretrained import read_run
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import start_parallel
from frozen_fast.search.checkpoint_settings import (
    EmbedSettings,
    fingerprint,
    load_for_search,
    parallel_config,
    settings_for,
    with_frames_of,
)
from frozen_fast.search.collection import collect
from frozen_fast.search.embed import text_vectors
from frozen_fast.search.embed_job import (
    EmbedSummary,
    Plan,
    Progress,
    captions_of,
    discard,
    embed_rows,
    finish_job,
    plan_job,
    share_of,
)
from frozen_fast.search.index import Index
from frozen_fast.search.index_folder import WORK_FOLDER, IndexInfo, index_lock
from frozen_fast.search.neighbours import RECALL_QUERIES
from frozen_fast.search.row_table import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Arguments of an embedding.

    Attributes:
        checkpoint: a frozen_fast folder or a released file.
        source: a folder, a manifest, packed shards, or what another source format takes.
        output: the index's folder; an index there is brought up to date.
        format: a format of data.sources, "folder" or "auto".
        split: of formats that have splits; empty: every line.
        frames: frames of a window; None: the run's evaluation.frames, or as many as the model learned.
        windows: "auto", "middle" or the most windows of a clip.
        stride_seconds: distance of windows; None: the run's.
        span_seconds: cut videos into spans of this length; None: a clip is one row.
        scenes: cut videos where the scene changes.
        dtype: of the stored vectors, "float32" or "float16".
        kind: how neighbours are found: "auto", "flat", "hnsw" or "ivfpq".
        model_kind: of a released file, as frozen_fast.load_model takes it; None: the folder's, a released file: frozen.
        tokenizer: name or folder; None: the checkpoint's own.
        batch_size: windows per forward pass on a process.
        workers: loader processes of a process; 0: a background thread.
        threads: decoding threads of a loader.
        decoder: backend that reads frames; None: the run's.
        device: "auto", "cpu" or "cuda".
        fresh: remove the index that is there first.
        add: rows of the index whose files the source does not name stay.
    """

    checkpoint: Path
    source: str
    output: Path
    format: str = "auto"
    split: str = ""
    frames: int | None = None
    windows: str | int = "auto"
    stride_seconds: float | None = None
    span_seconds: float | None = None
    scenes: bool = False
    dtype: str = "float32"
    kind: str = "auto"
    model_kind: str | None = None
    tokenizer: str | None = None
    batch_size: int = 32
    workers: int = 0
    threads: int = 2
    decoder: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fresh: bool = False
    add: bool = False

    def load(self, run: Mapping[str, Any], device: torch.device) -> tuple[RetrievalModel, EmbedSettings]:
        """The checkpoint's model, and how it embeds clips.

        Args:
            run: what the checkpoint says of its run.
            device: where the model runs.

        Raises:
            UserError: it cannot be read, or the request does not fit it.
        """
        settings = settings_for(
            run,
            frames=self.frames,
            windows=self.windows,
            stride_seconds=self.stride_seconds,
            decoder=self.decoder,
            span_seconds=self.span_seconds,
            scenes=self.scenes,
        )
        model = load_for_search(
            self.checkpoint,
            frames=settings.frames or None,
            kind=self.model_kind,
            tokenizer=self.tokenizer,
            device=device,
        )
        return model, with_frames_of(settings, model)

    def decode(self, settings: EmbedSettings) -> DecodeConfig:
        """How clips become frames.

        Raises:
            UserError: the decoder does not work in loader processes.
        """
        if self.workers and settings.decoder == "dali":
            raise UserError(
                "--workers: got the decoder dali, which runs in this process only; allowed: 0, or another --decoder"
            )
        decoder = settings.decoder
        return DecodeConfig(backend=decoder, threads=self.threads, workers=self.workers, on_bad_clip="skip")


def embed_to_index(request: EmbedRequest, progress: Callable[[int], Progress]) -> tuple[EmbedSummary, dict[str, Any]]:
    """Embed a source into an index; every process of a launch calls it.

    Args:
        request: what to do.
        progress: called with this process's number of clips; returns a function that is called after each clip.

    Returns:
        (what was done, what index.json says of neighbours), the same on every rank.

    Raises:
        UserError: a mistake in the request, the checkpoint or the source.
    """
    run = read_run(request.checkpoint)
    parallel = start_parallel(parallel_config(run.get("config", {}), request.device))
    set_up_logging(rank=parallel.rank)
    failed = True
    try:
        with parallel.together():
            model, settings = request.load(run, parallel.device)
        with contextlib.ExitStack() as held:
            result = _embed_on_ranks(request, model, settings, parallel, progress, held)
        failed = False
        return result
    except UserError:
        failed = False
        raise
    finally:
        parallel.close(failed=failed)


def _embed_on_ranks(
    request: EmbedRequest,
    model: RetrievalModel,
    settings: EmbedSettings,
    parallel: Parallel,
    progress: Callable[[int], Progress],
    held: contextlib.ExitStack,
) -> tuple[EmbedSummary, dict[str, Any]]:
    """Plan on rank 0, embed on all, finish on rank 0, which keeps other writers out meanwhile."""
    plan: Plan | None = None
    listed: list[BadClip] = []
    info = info_of(request, model, settings)
    with parallel.together():
        if parallel.is_main:
            held.enter_context(index_lock(request.output))
            plan, listed = plan_request(request, info, settings)
    plan = next(found for found in parallel.gather_objects(plan) if found is not None)
    rows = share_of(plan, parallel.rank, parallel.world_size)
    with parallel.together():
        dropped = embed_share(request, model, settings, rows, plan.source_kind, parallel, progress(len(rows)))
    bad = listed + [clip for found in parallel.gather_objects(dropped) for clip in found]
    result: tuple[EmbedSummary, dict[str, Any]] | None = None
    with parallel.together():
        if parallel.is_main:
            summary = finish_job(request.output, info, plan, bad, keep_others=request.add)
            held.close()
            result = summary, build_neighbours(request.output, model, request.kind)
    return next(found for found in parallel.gather_objects(result) if found is not None)


def plan_request(request: EmbedRequest, info: IndexInfo, settings: EmbedSettings) -> tuple[Plan, list[BadClip]]:
    """List the source and find out what needs embedding; the caller holds the index's lock.

    Returns:
        (the plan, clips of the source that cannot be read).
    """
    if request.fresh:
        discard(request.output)
    collection = collect(
        request.source,
        format=request.format,
        split=request.split,
        span_seconds=settings.span_seconds,
        scenes=settings.scenes,
        threads=request.threads,
        max_pixels=request.decode(settings).max_pixels,
    )
    plan = plan_job(request.output, info, collection, keep_others=request.add)
    log.info("embed: %d clips, %d of them are embedded already", len(plan.rows), len(plan.places))
    return plan, collection.bad_clips


def embed_share(
    request: EmbedRequest,
    model: RetrievalModel,
    settings: EmbedSettings,
    rows: Sequence[Row],
    source_kind: str,
    parallel: Parallel,
    progress: Progress,
) -> list[BadClip]:
    """Embed one process's rows into parts of the index's work folder.

    Returns:
        The clips that cannot be read.
    """
    return embed_rows(
        model,
        rows,
        source_kind,
        settings,
        request.output / WORK_FOLDER,
        decode=request.decode(settings),
        batch_size=request.batch_size,
        autocast=parallel.autocast,
        progress=progress,
    )


def info_of(request: EmbedRequest, model: RetrievalModel, settings: EmbedSettings) -> IndexInfo:
    """The index to be, without segments."""
    return IndexInfo(
        width=model.vector_width,
        dtype=request.dtype,
        checkpoint=str(request.checkpoint.resolve()),
        fingerprint=fingerprint(request.checkpoint),
        model_kind=request.model_kind,
        tokenizer=request.tokenizer,
        settings=settings.to_json(),
    )


def build_neighbours(output: Path, model: RetrievalModel, kind: str) -> dict[str, Any]:
    """Build the neighbour search; recall is measured with the clips' captions where there are enough of them."""
    index = Index(output)
    if index.neighbours_fit(kind):
        return index.info.neighbours
    captions = captions_of(index.folder, RECALL_QUERIES)
    queries = None
    if len(captions) >= RECALL_QUERIES and model.tokenizer is not None:
        queries = text_vectors(model, captions).numpy()
    return index.build(kind, queries)
