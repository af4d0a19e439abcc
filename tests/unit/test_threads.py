"""Daemon threads: results in order, errors as they are, work at the same time, and no program kept alive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from frozen_fast.data.decode.threads import DaemonPool, map_in_threads
from support.runs import environment


def test_results_come_in_order_and_threads_work_at_the_same_time() -> None:
    """Each of three items waits until all three are being worked on."""
    barrier = threading.Barrier(3, timeout=30)
    pool = DaemonPool(3, "test")

    def function(item: int) -> tuple[int, str]:
        barrier.wait()
        return item * 10, threading.current_thread().name

    assert pool.map(function, [2, 0, 1]) == [(20, "test"), (0, "test"), (10, "test")]
    assert pool.map(function, [5, 4, 3]) == [(50, "test"), (40, "test"), (30, "test")]
    pool.close()


def test_one_thread_or_one_item_is_the_callers_work() -> None:
    here = threading.get_ident()
    assert DaemonPool(1, "test").map(lambda item: threading.get_ident(), [1, 2]) == [here, here]
    assert DaemonPool(4, "test").map(lambda item: threading.get_ident(), [1]) == [here]
    assert map_in_threads(str, [], 4) == []


def test_the_first_items_error_is_raised_after_all_work() -> None:
    seen: list[int] = []

    def function(item: int) -> int:
        seen.append(item)
        if item:
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 1"):
        map_in_threads(function, [0, 1, 2], 2)
    assert sorted(seen) == [0, 1, 2]


def test_a_closed_pool_has_no_threads_and_starts_again() -> None:
    pool = DaemonPool(2, "test of closing")

    def alive() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "test of closing"]

    assert pool.map(abs, [-1, -2]) == [1, 2] and len(alive()) == 2
    threads = alive()
    pool.close()
    pool.close()
    for thread in threads:
        thread.join(30)
    assert not alive()
    assert pool.map(abs, [-3, -4]) == [3, 4]
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_pool_works_in_a_fork_and_a_hanging_thread_ends_with_the_program() -> None:
    script = """
import os, threading, time
from frozen_fast.data.decode.threads import DaemonPool
pool = DaemonPool(2, "test")
assert pool.map(abs, [-1, -2]) == [1, 2]
child = os.fork()
if child == 0:
    os._exit(7 if pool.map(abs, [-3, -4]) == [3, 4] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
threading.Thread(target=pool.map, args=(time.sleep, [3600, 3600]), daemon=True).start()
time.sleep(0.2)
raise SystemExit(5)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), timeout=60, check=False)
    assert done.returncode == 5
