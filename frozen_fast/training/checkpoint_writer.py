"""Writes checkpoints in a thread during training, from a snapshot in host memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from frozen_fast.common.files import is_full
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import CheckpointWriteError, OptimizerState

log = logging.getLogger(__name__)

RETRY_SECONDS = 20.0


class CheckpointWriter:
    """Runs actions in order in one thread; retries failed writes.

    If the disk is full, `make_room` may delete something; the action is then retried at once.

    An action raises CheckpointWriteError or OSError if a write fails. check() raises any other error.
    """

    def __init__(self, make_room: Callable[[], bool] = lambda: False) -> None:
        self._make_room = make_room
        self._actions: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition(threading.RLock())
        self._running = self._closed = False
        self._error: Exception | None = None
        self._failure = ""
        self._failing_since: float | None = None
        self._thread: threading.Thread | None = None

    def submit(self, action: Callable[[], None]) -> None:
        """Queue an action for the thread."""
        with self._condition:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="frozen_fast checkpoints", daemon=True)
                self._thread.start()
            self._actions.append(action)
            self._condition.notify_all()

    def wait_for_attempt(self) -> None:
        """Wait until everything is written or a write has failed."""
        with self._condition:
            self._condition.wait_for(lambda: not self._running and (not self._actions or bool(self._failure)))

    def settle(self) -> None:
        """Wait as in wait(), then drop failed writes, because a newer one follows."""
        with self._condition:
            self.wait_for_attempt()
            self._actions.clear()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until everything is written; returns whether it is."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._error is not None or (not self._running and not self._actions), timeout_seconds
            )

    def check(self, give_up_seconds: float) -> None:
        """Raise an error of the thread.

        Args:
            give_up_seconds: how long all writes may fail before this raises.

        Raises:
            CheckpointWriteError: writes have failed for too long.
        """
        with self._condition:
            error, since, failure = self._error, self._failing_since, self._failure
        if error is not None:
            raise error
        if since is not None and time.monotonic() - since >= give_up_seconds:
            raise CheckpointWriteError(
                f"{failure}; nothing could be saved for {give_up_seconds / 60:.3g} minutes "
                "(checkpoints.give_up_minutes)"
            )

    def close(self) -> None:
        """End the thread after the action in progress; what is waiting is not written."""
        with self._condition:
            self._closed = True
            self._actions.clear()
            self._condition.notify_all()

    @property
    def failure(self) -> str:
        """The current write error; empty: none."""
        return self._failure

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._actions) or self._closed)
                if self._closed:
                    return
                action = self._actions[0]
                self._running = True
            failure, error = "", None
            try:
                self._do(action)
            except (CheckpointWriteError, OSError) as caught:
                failure = str(caught)
            except Exception as caught:  # noqa: BLE001  check() raises it in the main thread
                error = caught
            with self._condition:
                self._running = False
                if failure:
                    self._note_failure(failure)
                else:
                    if self._actions:
                        self._actions.popleft()
                    self._error = self._error or error
                    if self._failure:
                        log.warning("checkpoints can be written again")
                    self._failure, self._failing_since = "", None
                self._condition.notify_all()
                if failure:  # a newer snapshot ends the pause early
                    self._condition.wait_for(partial(self._is_superseded, action), RETRY_SECONDS)

    def _do(self, action: Callable[[], None]) -> None:
        while True:
            try:
                return action()
            except (CheckpointWriteError, OSError) as error:
                if not (is_full(error) and self._make_room()):
                    raise

    def _is_superseded(self, action: Callable[[], None]) -> bool:
        return not self._actions or self._actions[0] is not action

    def _note_failure(self, failure: str) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.warning("%s; keeping the last valid checkpoint, continuing and retrying", failure)
        self._failure = failure


class Snapshot:
    """Copies of tensors in host memory; for tensors on a GPU the memory is page-locked and reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(
        self, weights: Mapping[str, Tensor], optimizer: OptimizerState
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """Copy weights and optimizer state; with tensors on a GPU this overwrites the copies of the last call.

        Args:
            weights: by name.
            optimizer: by parameter name and key.

        Returns:
            The same on the CPU.
        """
        copied = {name: self._copy(name, tensor) for name, tensor in weights.items()}
        state = {
            name: {key: self._copy(f"{name}/{key}", tensor) for key, tensor in tensors.items()}
            for name, tensors in optimizer.items()
        }
        if any(tensor.is_cuda for tensor in weights.values()):
            torch.cuda.synchronize()
        return copied, state

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.clone()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)


def total_bytes(weights: Mapping[str, Tensor], optimizer: OptimizerState) -> int:
    """Size of a snapshot in bytes."""
    tensors = [*weights.values(), *(tensor for state in optimizer.values() for tensor in state.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def not_saved(step: int, failure: str) -> UserError:
    """The error of a run whose last checkpoint could not be written."""
    return CheckpointWriteError(f"{failure}; the checkpoint of step {step} is lost, --resume auto continues before it")
