"""Time limits of a run's phases: when one is exceeded, every rank writes its stacks and the run ends.

Without limits, a hang (a stuck disk, a decoder that never returns, a collective that one rank never joins) would occupy
its machines indefinitely. Each rank has a thread that watches its own phase. Ranks run in lockstep, so all reach the
limit within seconds of each other. The first rank also requests the stacks of the other ranks on its machine (SIGUSR2,
handled without the interpreter) and resumes them (SIGCONT) in case one is stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from frozen_fast.config.schema import WatchdogConfig

log = logging.getLogger(__name__)

EXIT_HUNG = 1
_POLL_SECONDS = 1.0
_REARM_SECONDS = 10.0
_GRACE_SECONDS = 10.0
"""Time for the other ranks to write their stacks before the launcher ends them."""
_WITHOUT_INTERPRETER_SECONDS = 5.0
_TELL_STACKS = signal.SIGUSR2


class Watchdog:
    """Watches the phases of one rank between start() and close(); does nothing otherwise."""

    def __init__(
        self,
        limits: WatchdogConfig | None = None,
        *,
        folder: Path = Path(),
        rank: int = 0,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Initialise the watchdog.

        Args:
            limits: minutes of each phase; None: nothing is watched.
            folder: folder for rank_N.txt.
            rank: this process.
            note: called with a line about the hang before the process ends.
        """
        self._limits, self._folder, self._rank, self._note = limits, folder, rank, note
        self.loader_state: Callable[[], str] = lambda: "no loader yet"
        self._phases: list[tuple[str, float]] = []
        self._others: list[int] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def start(self, ranks: Sequence[tuple[str, int]] = ()) -> None:
        """Begin to watch.

        Args:
            ranks: (host, process) of every rank.
        """
        if self._limits is not None:
            host = socket.gethostname()
            self._others = [process for name, process in ranks if name == host and process != os.getpid()]
            faulthandler.register(_TELL_STACKS, file=self._open(), all_threads=True)
            self._thread = threading.Thread(target=self._watch, name="frozen_fast watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop watching. Can be called more than once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(_TELL_STACKS)
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None
            with contextlib.suppress(OSError):  # another rank's file is there
                self._folder.rmdir()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a phase: start, first_step, step, evaluation or checkpoint; a nested phase pauses the outer one."""
        self._phases.append((name, time.monotonic()))
        try:
            yield
        finally:
            self._phases.pop()
            if self._phases:  # the outer phase starts again with its full time limit
                self._phases[-1] = (self._phases[-1][0], time.monotonic())

    def _watch(self) -> None:
        armed = 0.0
        while not self._ended.wait(_POLL_SECONDS):
            phases = self._phases[-1:]
            if not phases:
                continue
            name, began = phases[0]
            limit = self._limit_seconds(name)
            if limit and time.monotonic() - began > limit:
                self._give_up(name, limit)
            if limit and time.monotonic() - armed > _REARM_SECONDS:
                # In case a thread never releases the GIL: C code writes the stacks and ends the process.
                armed = time.monotonic()
                faulthandler.dump_traceback_later(
                    limit + _REARM_SECONDS + _WITHOUT_INTERPRETER_SECONDS, exit=True, file=self._open()
                )

    def _limit_seconds(self, name: str) -> float:
        assert self._limits is not None
        return 60 * float(getattr(self._limits, f"{name}_minutes"))

    def _open(self) -> IO[str]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / f"rank_{self._rank}.txt").open("w", encoding="utf-8")
        return self._file

    def _give_up(self, name: str, limit: float) -> None:
        message = (
            f"hung: phase {name} took longer than {limit:g} s (watchdog.{name}_minutes); "
            f"the stacks of every rank are in {self._folder}"
        )
        log.error("%s", message)
        with contextlib.suppress(OSError):
            file = self._open()
            file.write(f"{message}\nrank {self._rank}, process {os.getpid()}, {time.ctime()}\n")
            file.write(f"loader: {self.loader_state()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
        for process in self._others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, _TELL_STACKS)
                os.kill(process, signal.SIGCONT)
        with contextlib.suppress(Exception):
            self._note(message)
        time.sleep(_GRACE_SECONDS)
        os._exit(EXIT_HUNG)


def switch_on_flight_recorder(folder: Path) -> None:
    """Let NCCL record its last collectives, and write them to a folder when one times out.

    Call this before initialising the process group; existing environment variables are kept.
    """
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl_rank_"),
    }.items():
        os.environ.setdefault(name, value)
