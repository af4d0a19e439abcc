"""`frozen-fast embed`: a checkpoint and a source into an index, on every process of a launch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frozen_fast.common.logs import set_up_logging
from frozen_fast.config.schema import DecodeConfig
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.parallel.base import Parallel
from frozen_fast.search.checkpoint_settings import (
    EmbedSettings,
    fingerprint,
    load_for_search,
    parallel_config,
    settings_for,
    with_learned_frames,
)
from frozen_fast.search.collection import collect
from frozen_fast.search.embed import text_vectors
from frozen_fast.search.embed_job import (
    EmbedSummary,
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

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """What to embed, with what, and where to.

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
        dtype: of the stored vectors, "float32" or "float16".
        kind: how neighbours are found: "auto", "flat", "hnsw" or "ivfpq".
        tokenizer: name or folder; None: the checkpoint's own.
        batch_size: windows per forward pass on a process.
        workers: loader processes of a process; 0: a background thread.
        threads: decoding threads of a loader.
        decoder: backend that reads frames; None: the run's.
        device: "auto", "cpu" or "cuda".
        fresh: remove the index that is there first.
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
    dtype: str = "float32"
    kind: str = "auto"
    tokenizer: str | None = None
    batch_size: int = 32
    workers: int = 0
    threads: int = 2
    decoder: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fresh: bool = False

    def decode(self, settings: EmbedSettings) -> DecodeConfig:
        """How clips become frames.

        Raises:
            UserError: the decoder does not work in loader processes.
        """
        if self.workers and settings.decoder == "dali":
            raise UserError("--workers: got the decoder dali, which works in this process; allowed: 0, or --decoder")
        decoder = settings.decoder
        return DecodeConfig(backend=decoder, threads=self.threads, workers=self.workers, on_bad_clip="skip")


def embed_to_index(request: EmbedRequest, progress: Callable[[int], Progress]) -> tuple[EmbedSummary, dict[str, Any]]:
    """Embed a source into an index; every process of a launch calls it.

    Args:
        request: what to do.
        progress: called with this process's number of clips; gives what is told after each.

    Returns:
        (what was done, what index.json says of neighbours), the same on every rank.

    Raises:
        UserError: a mistake in the request, the checkpoint or the source.
    """
    settings, trained = settings_for(
        request.checkpoint,
        frames=request.frames,
        windows=request.windows,
        stride_seconds=request.stride_seconds,
        decoder=request.decoder,
        span_seconds=request.span_seconds,
    )
    parallel = Parallel.start(parallel_config(trained, request.device))
    set_up_logging(rank=parallel.rank)
    failed = True
    try:
        with parallel.together():
            model = load_for_search(
                request.checkpoint,
                frames=settings.frames or None,
                trained=trained,
                tokenizer=request.tokenizer,
                device=parallel.device,
            )
            settings = with_learned_frames(settings, model)
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
    model: DualEncoder,
    settings: EmbedSettings,
    parallel: Parallel,
    progress: Callable[[int], Progress],
    held: contextlib.ExitStack,
) -> tuple[EmbedSummary, dict[str, Any]]:
    """Plan on rank 0, embed on all, finish on rank 0, which keeps other writers out meanwhile."""
    output, plan, listed = request.output, None, []
    info, decode = info_of(request, model, settings), request.decode(settings)
    with parallel.together():
        if parallel.is_main:
            held.enter_context(index_lock(output))
            if request.fresh:
                discard(output)
            collection = collect(
                request.source,
                format=request.format,
                split=request.split,
                span_seconds=request.span_seconds,
                threads=request.threads,
                max_pixels=decode.max_pixels,
            )
            plan, listed = plan_job(output, info, collection), collection.bad_clips
            log.info("embed: %d clips, %d of them are embedded already", len(plan.rows), len(plan.places))
    plan = next(found for found in parallel.gather_objects(plan) if found is not None)
    rows = share_of(plan, parallel.rank, parallel.world_size)
    with parallel.together():
        dropped = embed_rows(
            model,
            rows,
            plan.source_kind,
            settings,
            output / WORK_FOLDER,
            decode=decode,
            batch_size=request.batch_size,
            autocast=parallel.autocast,
            progress=progress(len(rows)),
        )
    bad = listed + [clip for found in parallel.gather_objects(dropped) for clip in found]
    result: tuple[EmbedSummary, dict[str, Any]] | None = None
    with parallel.together():
        if parallel.is_main:
            summary = finish_job(output, info, plan, bad)
            held.close()
            result = summary, build_neighbours(output, model, request.kind)
    return next(found for found in parallel.gather_objects(result) if found is not None)


def info_of(request: EmbedRequest, model: DualEncoder, settings: EmbedSettings) -> IndexInfo:
    """The index to be, without segments."""
    return IndexInfo(
        width=model.embedding_width,
        dtype=request.dtype,
        checkpoint=str(request.checkpoint.resolve()),
        fingerprint=fingerprint(request.checkpoint),
        tokenizer=request.tokenizer,
        settings=settings.to_json(),
    )


def build_neighbours(output: Path, model: DualEncoder, kind: str) -> dict[str, Any]:
    """Build what finds neighbours; recall is measured with the clips' captions where there are enough of them."""
    index = Index(output)
    if index.neighbours_fit(kind):
        return index.info.neighbours
    captions = captions_of(index.folder, RECALL_QUERIES)
    queries = None
    if len(captions) >= RECALL_QUERIES and model.tokenizer is not None:
        queries = text_vectors(model, captions).numpy()
    return index.build(kind, queries)
