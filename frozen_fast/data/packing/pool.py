"""Processes clips in worker processes, in order; a clip that crashes or hangs a decoder is a bad clip."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from frozen_fast.data.decode.types import ClipError
from frozen_fast.data.load.prefetch import process_context
from frozen_fast.data.sources import Clip

R = TypeVar("R")
_AHEAD = 4  # clips in flight per process


def _start_worker() -> None:
    """Use one compute thread per process, and end with the parent process."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=process_context(), initializer=_start_worker)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes, including ones that hang."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


def map_clips(
    function: Callable[[Clip], R], clips: Iterable[Clip], *, workers: int, timeout_seconds: float
) -> Iterator[tuple[Clip, R | ClipError]]:
    """Call a function on each clip; yields (clip, result) in order.

    Args:
        function: picklable where workers is above 0.
        clips: read a few ahead.
        workers: processes; 0: in this process, without protection from crashes and hangs.
        timeout_seconds: a clip that takes longer is a ClipError, timeout.
    """
    if workers == 0:
        for clip in clips:
            yield clip, function(clip)
        return
    remaining = iter(clips)
    waiting: deque[Clip] = deque()
    futures: deque[Future[R]] = deque()
    pool = _pool(workers)
    try:
        while True:
            for clip in islice(remaining, workers * _AHEAD - len(waiting)):
                waiting.append(clip)
                futures.append(pool.submit(function, clip))
            if not waiting:
                return
            clip, future = waiting.popleft(), futures.popleft()
            try:
                result: R | ClipError = future.result(timeout_seconds)
            except (BrokenProcessPool, FutureTimeout) as error:
                _stop(pool)
                result = _alone(function, clip, error, timeout_seconds)
                pool = _pool(workers)
                futures = deque(pool.submit(function, later) for later in waiting)
            yield clip, result
    finally:
        _stop(pool)


def _alone(function: Callable[[Clip], R], clip: Clip, error: Exception, timeout_seconds: float) -> R | ClipError:
    """Process a clip again in a separate process, to find out whether it ended the pool."""
    if isinstance(error, FutureTimeout):
        return _timeout(clip, timeout_seconds)
    pool = _pool(1)
    try:
        return pool.submit(function, clip).result(timeout_seconds)
    except BrokenProcessPool:
        return ClipError("decode_failed", "the decoder crashed on it", clip.path)
    except FutureTimeout:
        return _timeout(clip, timeout_seconds)
    finally:
        _stop(pool)


def _timeout(clip: Clip, timeout_seconds: float) -> ClipError:
    return ClipError("timeout", f"not decoded within {timeout_seconds:g} s", clip.path)
