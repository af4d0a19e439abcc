"""Handles SIGTERM, SIGINT and the death of the launcher: the loop stops after the current step.

SIGUSR1 is a wish for a checkpoint; the run continues.
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
    """Handles SIGTERM, SIGINT and SIGUSR1 in its context; a second stop after some seconds exits at once.

    One sooner is the same wish: Ctrl-C reaches this process from the terminal, and again from torchrun, which passes
    on the signal that it got itself.

    `accelerate launch` of one process dies of a SIGTERM without passing it on, and a launcher that is killed leaves its
    processes behind: they would train on, unseen. So a process that a launcher started also stops when its parent is
    gone. Outside the main thread signals cannot be heard.
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
        """Whether this process was asked for a checkpoint (SIGUSR1) since the last call."""
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
    """Whether reading failed because this process is being stopped.

    A signal to the whole process group (Ctrl-C, Slurm) ends loader processes too, maybe before this process has heard
    it; so for a loader process that ended the signal is waited for. Any other failure after a stop request goes
    wrong again when the run resumes.

    Args:
        error: what reading raised.
        asked: tells whether this process was told to stop.
    """
    deadline = time.monotonic() + (_SIGNAL_SPREAD_SECONDS if isinstance(error, LoaderEndedError) else 0.0)
    while not asked():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    log.warning("discarding the batch in flight: %s", error)
    return True


def _started_by_a_launcher() -> bool:
    """Whether accelerate's or torch's launcher started this process and lives as long as it."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
