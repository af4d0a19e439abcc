"""`frozen-fast embed --ray`: the processes of an embedding as tasks of a Ray cluster, whose machines share a disk.

The driver lists the source and writes the index, as rank 0 of a launch does. Task i of n embeds what rank i of n would,
and writes parts to the index's work folder; Ray starts a task again whose machine is lost, and rows of its finished
parts are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from frozen_fast.data import BadClip
from frozen_fast.errors import UserError
from frozen_fast.models.pretrained import read_run
from frozen_fast.parallel.start import start_parallel
from frozen_fast.search.checkpoint_settings import parallel_config
from frozen_fast.search.embed_job import EmbedSummary, Progress, finish_job, share_of
from frozen_fast.search.embed_run import EmbedRequest, build_neighbours, embed_share, info_of, plan_request
from frozen_fast.search.index_folder import index_lock
from frozen_fast.search.row_table import Row

POLL_SECONDS = 1.0


def embed_on_ray(
    request: EmbedRequest, progress: Callable[[int], Progress], *, address: str, workers: int
) -> tuple[EmbedSummary, dict[str, Any]]:
    """Embed a source into an index with tasks of a Ray cluster.

    Args:
        request: what to do; checkpoint, source and output are on a disk that every machine of the cluster sees under
            the same path.
        progress: called with the number of clips; returns a function that is called for embedded clips.
        address: of a running cluster ("auto": the one of this machine), or "local": one that ends with the call.
        workers: tasks; each takes one CPU, and a GPU where the cluster has some and request.device allows it.

    Returns:
        (what was done, what index.json says of neighbours).

    Raises:
        UserError: Ray is missing or not reached, or a mistake in the request, the checkpoint or the source.
    """
    request = replace(request, checkpoint=request.checkpoint.resolve(), output=request.output.resolve())
    model, settings = request.load(read_run(request.checkpoint), torch.device("cpu"))
    info = info_of(request, model, settings)
    with index_lock(request.output):
        plan, bad = plan_request(request, info, settings)
        if plan.todo:
            shares = [share for rank in range(workers) if (share := share_of(plan, rank, workers))]
            with cluster(address, len(shares)) as ray:
                bad = bad + _run_tasks(ray, request, shares, plan.source_kind, progress(len(plan.todo)))
        summary = finish_job(request.output, info, plan, bad, keep_others=request.add)
    return summary, build_neighbours(request.output, model, request.kind)


@contextlib.contextmanager
def cluster(address: str, workers: int) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one on this machine; gives the ray module.

    Raises:
        UserError: Ray is missing, or no cluster is at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray: {error.name} is missing; allowed: pip install 'frozen-fast[ray]'") from None
    try:
        if address == "local":
            ray.init(address="local", num_cpus=workers, include_dashboard=False)
        else:
            ray.init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray: got {address!r} ({error}); allowed: local, auto, or a cluster's address") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _run_tasks(
    ray: Any, request: EmbedRequest, shares: Sequence[list[Row]], source_kind: str, progress: Progress
) -> list[BadClip]:
    """Embed each share in a task of its own; gives the clips that cannot be read."""
    from ray.util.queue import Queue

    told = Queue(actor_options={"num_cpus": 0})
    gpus = 0 if request.device == "cpu" else int(ray.cluster_resources().get("GPU", 0) > 0)
    task = ray.remote(num_cpus=1, num_gpus=gpus)(embed_on_worker)
    waiting = [task.remote(request, share, source_kind, told) for share in shares]
    bad: list[BadClip] = []
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for counts in told.get_nowait_batch(told.qsize()):
                progress(*counts)
            for clips in ray.get(done):
                bad += clips
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return bad


def embed_on_worker(request: EmbedRequest, rows: Sequence[Row], source_kind: str, told: Any) -> list[BadClip]:
    """Embed one task's rows; runs in a process of the cluster.

    Args:
        request: as on the driver.
        rows: what to embed.
        source_kind: of the whole source.
        told: queue for (clips embedded, bad clips) since the last entry.

    Returns:
        The clips that cannot be read.
    """
    run = read_run(request.checkpoint)
    parallel = start_parallel(parallel_config(run.get("config", {}), request.device))
    try:
        model, settings = request.load(run, parallel.device)

        def tell(done: int, bad: int) -> None:
            told.put((done, bad))

        return embed_share(request, model, settings, rows, source_kind, parallel, tell)
    finally:
        parallel.close()
