"""Thread pool of daemon threads, which do not block the end of a program.

The interpreter waits for Python's own thread pools at exit, so a read that never returns would keep a failed run alive.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class _Raised:
    """An exception to raise in the calling thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class DaemonPool:
    """A pool of daemon threads; they start with the first task, also after a fork."""

    def __init__(self, threads: int, name: str) -> None:
        """Plan a pool of threads of a given number and name."""
        self._threads = threads
        self._name = name
        self._process = 0
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def map(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Call a function on each item; results in order, the first item's exception raised where some fail.

        One thread or one item needs no pool: then the caller's thread does the work.
        """
        if self._threads <= 1 or len(items) <= 1:
            return [function(item) for item in items]
        self._start()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for number, item in enumerate(items):
            self._tasks.put((function, item, number, done))
        results: list[Any] = [None] * len(items)
        for _ in items:
            number, result = done.get()
            results[number] = result
        for result in results:
            if isinstance(result, _Raised):
                raise result.error
        return results

    def close(self) -> None:
        """End the threads after their tasks, without waiting. Can be called more than once."""
        if self._process == os.getpid():
            for _ in range(self._threads):
                self._tasks.put(None)
        self._process = 0

    def _start(self) -> None:
        if self._process == os.getpid():
            return
        self._tasks = queue.SimpleQueue()
        self._process = os.getpid()
        for _ in range(self._threads):
            threading.Thread(target=_work, args=(self._tasks,), name=self._name, daemon=True).start()


def _work(tasks: queue.SimpleQueue[Any]) -> None:
    """Run tasks until the pool closes."""
    while (task := tasks.get()) is not None:
        function, item, number, done = task
        try:
            result = function(item)
        except BaseException as error:  # noqa: BLE001  raised in the thread that asked
            result = _Raised(error)
        done.put((number, result))
        del task, function, item, done, result  # a waiting thread keeps no frames alive


def map_in_threads(function: Callable[[S], T], items: Sequence[S], threads: int) -> list[T]:
    """Call a function on each item by a pool that lives for this call; as DaemonPool.map."""
    pool = DaemonPool(min(threads, len(items)), "frozen_fast map")
    try:
        return pool.map(function, items)
    finally:
        pool.close()
