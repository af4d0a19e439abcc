"""`frozen-fast extract --expert`: a network over a source into a feature store, on every process of a launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from frozen_fast.common.logs import set_up_logging
from frozen_fast.config.schema import DecodeConfig, EvaluationConfig
from frozen_fast.data import BadClip, Clip, Source
from frozen_fast.data.load.for_model import FrameFormat, build_evaluation_loader
from frozen_fast.data.plan.frame_sampling import Segments
from frozen_fast.errors import UserError
from frozen_fast.models.feature_tower import FeatureTower, weights_fingerprint
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.start import start_parallel
from frozen_fast.search.checkpoint_settings import check_decoder, parallel_config
from frozen_fast.search.collection import clips_of
from frozen_fast.search.embed import window_features
from frozen_fast.search.embed_job import PartWriter, Progress, write_parts
from frozen_fast.search.extract_job import (
    KEY,
    Extraction,
    ExtractSummary,
    check_name,
    features_table,
    finish_extraction,
    plan_extraction,
)
from frozen_fast.search.index_folder import index_lock


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """Arguments of an extraction.

    Attributes:
        name: the expert's in the store.
        source: a folder, a manifest, packed shards, or what another source format takes.
        output: the store's folder; a store there gets one more expert.
        format: a format of data.sources, "folder" or "auto".
        splits: of formats that have splits; none: every line.
        split_version: of data sets whose splits have versions.
        rate: vectors per second of a clip; 0: one for the whole clip.
        pool: "mean": the mean of a clip's vectors, one per clip; "none": all of them, in order of time.
        max_vectors: most vectors of a clip, evenly spread; 0: all.
        resize: short side before the centre crop, for a 224 model.
        batch_size: windows per forward pass on a process.
        workers: loader processes of a process; 0: a background thread.
        threads: decoding threads of a loader.
        decoder: backend that reads frames.
        device: "auto", "cpu" or "cuda".
        precision: "auto", "bf16" or "fp32", as training.precision.
        fresh: forget what the store holds of the expert.
    """

    name: str
    source: str
    output: Path
    format: str = "auto"
    splits: tuple[str, ...] = ()
    split_version: str = ""
    rate: float = 1.0
    pool: Literal["mean", "none"] = "mean"
    max_vectors: int = 0
    resize: int = 256
    batch_size: int = 32
    workers: int = 0
    threads: int = 2
    decoder: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    fresh: bool = False

    def check(self) -> None:
        """Check the arguments before loading anything.

        Raises:
            UserError: naming the option.
        """
        check_name("--expert", self.name)
        check_decoder(self.decoder)
        if not self.rate >= 0:
            raise UserError(f"--rate: got {self.rate:g}; allowed: vectors per second, from 0")
        if self.workers and self.decoder == "dali":
            raise UserError(
                "--workers: got the decoder dali, which runs in this process only; allowed: 0, or another --decoder"
            )


def extract_to_store(
    request: ExtractRequest, build: Callable[[], FeatureTower], progress: Callable[[int], Progress]
) -> ExtractSummary:
    """Extract an expert into a store; every process of a launch calls it.

    Args:
        request: what to do.
        build: makes the network, on the CPU.
        progress: called with this process's number of clips; returns a function that is called after each clip.

    Returns:
        What was done, the same on every rank.

    Raises:
        UserError: a mistake in the request, the network or the source.
    """
    request.check()
    parallel = start_parallel(parallel_config({"training": {"precision": request.precision}}, request.device))
    set_up_logging(rank=parallel.rank)
    failed = True
    try:
        with parallel.together():
            torch.manual_seed(0)  # a network of random weights is the same on every rank and in a later call
            tower = build()
            tower.module.to(parallel.device)
        with contextlib.ExitStack() as held:
            summary = _extract_on_ranks(request, tower, parallel, progress, held)
        failed = False
        return summary
    except UserError:
        failed = False
        raise
    finally:
        parallel.close(failed=failed)


def _extract_on_ranks(
    request: ExtractRequest,
    tower: FeatureTower,
    parallel: Parallel,
    progress: Callable[[int], Progress],
    held: contextlib.ExitStack,
) -> ExtractSummary:
    """Plan on rank 0, extract on all, finish on rank 0, which keeps other writers out meanwhile."""
    job: Extraction | None = None
    share: tuple[Path, list[tuple[str, Clip]]] | None = None
    with parallel.together():
        if parallel.is_main:
            held.enter_context(index_lock(request.output))
            clips, source = read_clips(request)
            job = plan_extraction(
                request.output,
                request.name,
                origin_of(request, tower, parallel.precision),
                clips,
                source,
                fresh=request.fresh,
            )
            share = job.work, [(job.keys[clip.id], clip) for clip in job.todo]
    work, todo = next(found for found in parallel.gather_objects(share) if found is not None)
    own = todo[parallel.rank :: parallel.world_size]
    with parallel.together():
        dropped = extract_clips(request, tower, own, work, parallel, progress(len(own)))
    bad = [clip for found in parallel.gather_objects(dropped) for clip in found]
    summary: ExtractSummary | None = None
    with parallel.together():
        if job is not None:
            kind: Literal["vector", "set"] = "vector" if request.pool == "mean" else "set"
            summary = finish_extraction(job, kind, tower.width, [*job.bad_clips, *bad])
    return next(found for found in parallel.gather_objects(summary) if found is not None)


def read_clips(request: ExtractRequest) -> tuple[list[Clip], str]:
    """The clips of all splits, and the source's format."""
    clips: list[Clip] = []
    chosen = ""
    for split in request.splits or ("",):
        chosen, found, _ = clips_of(
            request.source, format=request.format, split=split, split_version=request.split_version
        )
        clips += found
    return clips, chosen


def origin_of(request: ExtractRequest, tower: FeatureTower, precision: str) -> dict[str, Any]:
    """What decides an expert's vectors beside the clips, as the store keeps it."""
    return {
        "network": tower.description,
        "fingerprint": weights_fingerprint(tower.module),
        "frames": tower.frames,
        "rate": request.rate,
        "pool": request.pool,
        "max_vectors": request.max_vectors,
        "resize": request.resize,
        "mean": tower.mean,
        "std": tower.std,
        "decoder": request.decoder,
        "precision": precision,
    }


def extract_clips(
    request: ExtractRequest,
    tower: FeatureTower,
    todo: Sequence[tuple[str, Clip]],
    work: Path,
    parallel: Parallel,
    progress: Progress,
) -> list[BadClip]:
    """Extract one process's share of the clips and write it to parts.

    Returns:
        The clips that could not be read.
    """
    if not todo:
        return []
    mean, std = tower.mean, tower.std
    loader = build_evaluation_loader(
        Source("source", "clips", [clip for _, clip in todo]),
        FrameFormat(tower.resolution, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])),
        evaluation=EvaluationConfig(resize=request.resize, batch_size=request.batch_size),
        decode=DecodeConfig(
            backend=request.decoder, threads=request.threads, workers=request.workers, on_bad_clip="skip"
        ),
        device=parallel.device,
        frames=tower.frames,
        segments=Segments(1 / request.rate if request.rate else 0.0, request.max_vectors),
    )

    pixels = PixelNormalisation(mean, std).to(parallel.device)

    def vectors() -> Iterator[tuple[int, Tensor]]:
        encoded = window_features(lambda x: {"vectors": tower.encode(pixels(x))}, loader, parallel.autocast)
        for index, windows in encoded:
            rows_ND = torch.cat([window["vectors"] for window in windows])
            yield index, rows_ND.mean(0, keepdim=True) if request.pool == "mean" else rows_ND

    writer = PartWriter(work, features_table)
    return write_parts(writer, [{KEY: key} for key, _ in todo], vectors(), loader.dropped, progress)
