"""The process of a trial: started in its own session, and stopped with its children when it exceeds a limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0


class StoppedError(Exception):
    """The caller requested a stop, and the process was ended."""


@dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """How a process ended: its exit code (negative: a signal), wall time, and which limit it passed."""

    exit_code: int
    seconds: float
    timed_out: bool
    over_memory: bool
    peak_resident_bytes: int


def free_port() -> int:
    """A TCP port on the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants (pages they share count for each)."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return total
    return total


def stop_session(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """End every process of the session: asked first, killed after a grace period."""
    for signal_number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and session_alive(process.pid):
            process.poll()
            time.sleep(POLL_SECONDS)


def session_alive(session: int) -> bool:
    """Whether a process of this group still exists (including zombies)."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def run_limited(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    seconds: float,
    memory_bytes: int | None,
    grace_seconds: float = GRACE_SECONDS,
    stop: threading.Event | None = None,
) -> ProcessResult:
    """Run a command with its output in `log`, stopping it past `seconds` or `memory_bytes` (resident, whole tree).

    One that is stopped has `grace_seconds` to end by itself before it is killed.

    Raises:
        StoppedError: `stop` was set meanwhile, from another thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    timed_out = over_memory = False
    peak = 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                used = resident_bytes(process.pid)
                peak = max(peak, used)
                over_memory = memory_bytes is not None and used > memory_bytes
                timed_out = time.monotonic() - started > seconds
                if over_memory or timed_out:
                    break
                if stop is not None and stop.is_set():
                    raise StoppedError
                time.sleep(POLL_SECONDS)
        finally:
            stop_session(process, grace_seconds)
    return ProcessResult(
        exit_code=process.wait(),
        seconds=time.monotonic() - started,
        timed_out=timed_out,
        over_memory=over_memory,
        peak_resident_bytes=peak,
    )
