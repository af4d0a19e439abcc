"""One writer per run folder: who holds it, when it is free, and whether its run is alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frozen_fast.errors import UserError
from frozen_fast.records import run_lock
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock, is_alive

HOLDS = """
import sys, time
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock
RunLock(RunFolder(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path)
    found.create()
    return found


def test_a_second_run_is_refused_and_names_the_first_until_it_is_killed(folder: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        assert is_alive(folder)
        with pytest.raises(UserError, match=f"which another run is writing to .process {holder.pid} on .*, since 20"):
            RunLock(folder).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert not is_alive(folder)
    lock = RunLock(folder)
    lock.acquire()
    lock.release()


def test_a_released_folder_is_free_and_its_lock_names_nobody(folder: RunFolder) -> None:
    lock = RunLock(folder)
    lock.acquire()
    assert is_alive(folder) and json.loads(folder.lock.read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()
    assert not is_alive(folder) and folder.lock.read_bytes() == b""
    assert not is_alive(RunFolder(folder.path / "nowhere"))


def test_a_holder_on_another_machine_counts_while_its_heart_beats(folder: RunFolder) -> None:
    """Machines that share a folder may not share flock."""
    folder.lock.write_text(json.dumps({"host": "another-machine", "pid": 7, "started": "1", "since": 1.7e9}))
    assert is_alive(folder)
    with pytest.raises(UserError, match="process 7 on another-machine"):
        RunLock(folder).acquire()
    old = time.time() - run_lock.DEAD_AFTER_SECONDS - 1
    os.utime(folder.lock, (old, old))
    assert not is_alive(folder)
    lock = RunLock(folder)
    lock.acquire()
    lock.release()


def test_the_heart_beats_in_the_lock_and_in_the_status(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    folder.write_status("running", step=1, stage=0)
    first = json.loads(folder.status.read_text())["heartbeat"]
    os.utime(folder.lock.parent)
    lock = RunLock(folder)
    lock.acquire()
    os.utime(folder.lock, (1.0, 1.0))
    deadline = time.monotonic() + 20
    while json.loads(folder.status.read_text())["heartbeat"] == first and time.monotonic() < deadline:
        time.sleep(0.02)
    lock.release()
    assert json.loads(folder.status.read_text())["heartbeat"] > first
    assert folder.lock.stat().st_mtime > 1.0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": 1, "pid": "x"}', b"\xff"])
def test_a_damaged_lock_file_holds_nobody_off(folder: RunFolder, content: bytes) -> None:
    folder.lock.write_bytes(content)
    os.utime(folder.lock, (1.0, 1.0))
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
