"""Handles SIGTERM, SIGINT and the death of the launcher: the loop stops after the current step.

SIGUSR1 requests a checkpoint; the run continues.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from frozen_fast.data import LoaderEndedError

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A signal reaches the processes of a group one after the other, and some of them twice.
_SIGNAL_SPREAD_SECONDS = 3.0
_POLL_SECONDS = 0.05


class StopRequest:
    """Handles SIGTERM, SIGINT and SIGUSR1 in its context; a second stop signal after some seconds exits at once.

    An earlier second signal counts as the first: Ctrl-C reaches this process from the terminal, and again from
    torchrun, which forwards signals. `accelerate launch` of one process does not forward SIGTERM, and a killed launcher
    does not end its processes. A process of a launcher therefore also stops when its parent has died. Outside the main
    thread no signals are handled.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._save = threading.Event()
        self._heard_seconds: float | None = None
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if _started_by_a_launcher() else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._hear)
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._hear_save)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def asked(self) -> bool:
        """Whether a stop was requested."""
        if self._launcher is not None and os.getppid() != self._launcher and not self._event.is_set():
            log.warning("the launcher has died: stopping after this step, with a checkpoint")
            self._event.set()
        return self._event.is_set()

    def take_save_request(self) -> bool:
        """Return whether a checkpoint was requested (SIGUSR1) since the last call."""
        asked = self._save.is_set()
        self._save.clear()
        return asked

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._heard_seconds is None:
            self._heard_seconds = now
        elif now - self._heard_seconds >= _SIGNAL_SPREAD_SECONDS:
            name = signal.Signals(number).name
            raise KeyboardInterrupt(f"a second {name}: exiting at once, without a checkpoint")
        self._event.set()
        log.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def _hear_save(self, number: int, frame: FrameType | None) -> None:
        self._save.set()
        log.warning("SIGUSR1: a checkpoint after this step")


def stop_explains(error: Exception, asked: Callable[[], bool]) -> bool:
    """Return whether reading failed because this process is being stopped.

    A signal to the whole process group (Ctrl-C, Slurm) also ends loader processes, possibly before this process
    receives it. If a loader process has ended, this function therefore waits for the signal. Any other failure occurs
    again when the run resumes.

    Args:
        error: the exception raised by reading.
        asked: returns whether this process was told to stop.
    """
    deadline = time.monotonic() + (_SIGNAL_SPREAD_SECONDS if isinstance(error, LoaderEndedError) else 0.0)
    while not asked():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    log.warning("discarding the batch in flight: %s", error)
    return True


def _started_by_a_launcher() -> bool:
    """Return whether accelerate's or torch's launcher started this process and has the same lifetime."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
