"""Prefetching in a thread or in worker processes, with errors passed on and time-outs."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset

from frozen_fast.errors import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 2.0
_WORKER_POLL_SECONDS = 1.0
_WORKER_START_SECONDS = 60.0


class Prefetcher(Protocol[T_co]):
    """An iterator that prefetches its items."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def close(self) -> None:
        """Stop prefetching. Can be called more than once."""
        ...


def timed_out(what: str, timeout_seconds: float) -> UserError:
    """The error of a consumer that waited too long."""
    return UserError(
        f"data.decode.read_timeout_seconds: waited for {what} longer than {timeout_seconds:g} s; allowed: faster "
        "storage, or a larger value"
    )


class LoaderEndedError(UserError):
    """A loader process ended early: a crash, no memory, or a signal to the whole process group."""


def _loader_ended(what: str, error: Exception) -> LoaderEndedError:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return LoaderEndedError(
        f"data.decode.workers: a loader process ended while reading {what} (a crash in a decoder, or no memory left: "
        f"{why}); allowed: fewer workers, or another backend"
    )


class _Failure:
    """An exception to raise in the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @classmethod
    def of_worker(cls, error: BaseException) -> _Failure:
        """Return a failure with an exception that can be pickled."""
        try:
            pickle.loads(pickle.dumps(error))
            return cls(error)
        except Exception:  # noqa: BLE001  whatever an exception's own pickling raises
            return cls(RuntimeError(f"{type(error).__name__}: {error}"))


_END = object()


class ThreadPrefetcher(Generic[T]):
    """Runs a generator in one daemon thread, up to `depth` items ahead."""

    def __init__(
        self,
        make: Callable[[], Iterator[T]],
        *,
        depth: int,
        timeout_seconds: float,
        describe: Callable[[], str],
    ) -> None:
        """Start the thread.

        Args:
            make: called in the thread; a generator is closed there too.
            depth: largest number of prefetched items, at least 1.
            timeout_seconds: a consumer that waits longer gets a UserError.
            describe: describes the next item, for messages.
        """
        self._make = make
        self._timeout_seconds = timeout_seconds
        self._describe = describe
        self._queue: queue.Queue[Any] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="frozen_fast loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            items = self._make()
            try:
                for item in items:
                    if not self._put(item):
                        return
            finally:
                if isinstance(items, Generator):
                    items.close()
            self._put(_END)
        except BaseException as error:  # noqa: BLE001  the consumer raises it
            self._put(_Failure(error))

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._finished:
            raise StopIteration
        try:
            item = self._queue.get(timeout=self._timeout_seconds)
        except queue.Empty:
            error = timed_out(self._describe(), self._timeout_seconds)
            self.close()
            raise error from None
        if item is _END or isinstance(item, _Failure):
            self.close()
            if isinstance(item, _Failure):
                raise item.error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop the thread; after two seconds, abandon one that is blocked in a read (it is a daemon)."""
        self._finished = True
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(_JOIN_SECONDS)


class _MapTask(Dataset[Any]):
    """Runs in a worker: creates its function once and calls it for each item."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._function: Callable[[Any], Any] | None = None

    def __getitem__(self, item: Any) -> Any:
        try:
            if self._function is None:
                self._function = self._make()
            return self._function(item)
        except Exception as error:  # noqa: BLE001  the consumer raises it
            return _Failure.of_worker(error)


class _StreamTask(IterableDataset[Any]):
    """Runs in a worker: yields the items of this worker's generator."""

    def __init__(self, make: Callable[[int, int], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        assert info is not None
        try:
            yield from self._make(info.id, info.num_workers)
        except Exception as error:  # noqa: BLE001  the consumer raises it
            yield _Failure.of_worker(error)


class _Pump:
    """Calls next() in a thread: a process that stops while sending blocks its reader without a time-out."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(iterator,), name="frozen_fast loader results", daemon=True).start()

    def take(self, timeout_seconds: float) -> Any:
        """Take the next item, or raise what the iterator raised; queue.Empty after the time-out."""
        self._requests.put(True)
        item, error = self._answers.get(timeout=timeout_seconds)
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """End the thread."""
        self._requests.put(False)

    def _run(self, iterator: Iterator[Any]) -> None:
        while self._requests.get():
            try:
                self._answers.put((next(iterator), None))
            except BaseException as error:  # noqa: BLE001  the consumer raises it
                self._answers.put((None, error))


class WorkerPrefetcher(Generic[T]):
    """Runs work in `workers` processes with torch's DataLoader; the order of results is fixed.

    The first item of each worker may take a minute longer than the time-out, because the process starts first.
    """

    def __init__(
        self,
        task: _MapTask | _StreamTask,
        items: Iterable[Any] | None,
        *,
        workers: int,
        depth: int,
        timeout_seconds: float,
        describe: Callable[[], str],
        pin_memory: bool = False,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._describe = describe
        self._starting = workers
        self._timed_out = False
        loader: DataLoader[Any] = DataLoader(
            task,
            batch_size=None,
            sampler=items,  # type: ignore[arg-type]  # any iterable does; torch asks for Iterable | Sampler
            num_workers=workers,
            prefetch_factor=max(1, -(-depth // workers)),
            timeout=_WORKER_POLL_SECONDS,
            pin_memory=pin_memory,
            multiprocessing_context=process_context(),
        )
        try:
            self._iterator: Iterator[Any] | None = iter(loader)
            self._pump = _Pump(self._iterator)
        except (OSError, EOFError) as error:
            raise _loader_ended(describe(), error) from None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._iterator is None:
            raise StopIteration
        try:
            item = self._wait()
        except BaseException:
            self.close()
            raise
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        self._starting = max(0, self._starting - 1)
        return item

    def _wait(self) -> Any:
        """The next item. torch's own time-out is used as a poll, which also finds a process that died."""
        deadline = time.monotonic() + self._timeout_seconds + (_WORKER_START_SECONDS if self._starting else 0)
        while True:
            if self._iterator is None:  # closed by another thread
                raise StopIteration
            try:
                return self._pump.take(max(0.0, deadline - time.monotonic()) + 2 * _WORKER_POLL_SECONDS)
            except queue.Empty:
                self._timed_out = True
                raise timed_out(self._describe(), self._timeout_seconds) from None
            except (OSError, EOFError) as error:  # the connection that transfers the tensors
                raise _loader_ended(self._describe(), error) from None
            except RuntimeError as error:
                message = str(error)
                if "exited unexpectedly" in message or "is killed by signal" in message:
                    raise _loader_ended(self._describe(), error) from None
                if "timed out" not in message:
                    raise
                if time.monotonic() >= deadline:
                    self._timed_out = True
                    raise timed_out(self._describe(), self._timeout_seconds) from None

    def worker_states(self) -> list[str]:
        """Each process's id and state in /proc (R running, S sleeping, D disk, T stopped)."""
        states = []
        for worker in getattr(self._iterator, "_workers", ()):
            try:
                state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, IndexError):
                state = "gone"
            states.append(f"loader process {worker.pid}: {state}")
        return states

    def close(self) -> None:
        """Stop the processes, and kill those that do not respond.

        torch's own shutdown sends SIGTERM, which a process that is stopped (SIGSTOP) or waits for a dead disk never
        handles: the join at the end of this process would then never return.
        """
        workers = list(getattr(self._iterator, "_workers", ()))
        if self._timed_out:
            for worker in workers:
                worker.kill()
        self._iterator = None
        self._pump.close()
        for worker in workers:
            worker.join(_JOIN_SECONDS)
            if worker.is_alive():
                worker.kill()


def map_in_workers(
    make: Callable[[], Callable[[Any], T]],
    items: Iterable[Any],
    *,
    workers: int,
    depth: int,
    timeout_seconds: float,
    describe: Callable[[], str],
    pin_memory: bool = False,
) -> WorkerPrefetcher[T]:
    """Call make()(item) for each item in worker processes; results come in the order of the items."""
    return WorkerPrefetcher(
        _MapTask(make),
        items,
        workers=workers,
        depth=depth,
        timeout_seconds=timeout_seconds,
        describe=describe,
        pin_memory=pin_memory,
    )


def stream_from_workers(
    make: Callable[[int, int], Iterable[T]],
    *,
    workers: int,
    depth: int,
    timeout_seconds: float,
    describe: Callable[[], str],
    pin_memory: bool = False,
) -> WorkerPrefetcher[T]:
    """Yield what make(worker, workers) yields in each worker process, in turn."""
    return WorkerPrefetcher(
        _StreamTask(make),
        None,
        workers=workers,
        depth=depth,
        timeout_seconds=timeout_seconds,
        describe=describe,
        pin_memory=pin_memory,
    )


def process_context() -> multiprocessing.context.BaseContext:
    """The start method of worker processes: not fork, because decoders and threads do not survive it.

    A fork server imports the workers' modules once, so that the workers of later stages start quickly.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_fast.data.load.training_loader"])
    return context
