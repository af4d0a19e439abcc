"""Lock of a run folder (one writer), with its holder and a heartbeat.

The lock is an flock on run.lock, which the system releases when the process ends for any reason. Its content names
the holder. Machines that share a folder may not share locks, so a holder on another machine counts as alive while it
renews the time of run.lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 120.0
"""A run on another machine counts as dead if its last heartbeat is older than this."""


class RunLock:
    """Holds a run folder for this process until release()."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Lock the folder, which must exist, and start the heartbeat.

        Raises:
            UserError: another run holds it; names host, process and since when.
        """
        path = self._folder.lock
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            holder = _holder(path)
            if not _flock(descriptor) or _is_alive_elsewhere(path, holder):
                raise UserError(
                    f"run_folder: got {str(self._folder.path)!r}, which another run is writing to "
                    f"({_describe(holder)}); allowed: another run_folder, or wait until that run has ended"
                )
        except BaseException:
            os.close(descriptor)
            raise
        if holder is not None:
            log.warning(
                "the run that locked %s died without releasing the lock (%s)", self._folder.path, _describe(holder)
            )
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk: the flock itself holds
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({**mine, "since": time.time()}).encode(), 0)
        self._thread = threading.Thread(target=self._beat, name="frozen_fast heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock. Can be called more than once."""
        if self._descriptor is None:
            return
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a temporary disk error; the next beat retries
                os.utime(self._folder.lock)
                self._folder.beat()


def is_alive(folder: RunFolder) -> bool:
    """Whether a process currently writes to a run folder."""
    try:
        descriptor = os.open(folder.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        holder = _holder(folder.lock)
        return not _flock(descriptor, fcntl.LOCK_SH) or _is_alive_elsewhere(folder.lock, holder)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock was free; True on a file system without locks, where run.lock's content decides."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _holder(path: Path) -> dict[str, Any] | None:
    """The holder in run.lock; None if there is none."""
    try:
        holder = json.loads(path.read_bytes() or b"null")
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _is_alive_elsewhere(path: Path, holder: dict[str, Any] | None) -> bool:
    """Whether a holder without an flock is alive: on another machine, or without file locks."""
    if holder is None:
        return False
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        started = _process_start(pid) if isinstance(pid, int) else None
        return pid != os.getpid() and started is not None and started == holder.get("started")
    return time.time() - path.stat().st_mtime < DEAD_AFTER_SECONDS


def _process_start(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot, or None. Start and process id identify a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "holder unknown"
    since = holder.get("since")
    when = time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, float) else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{when}"
