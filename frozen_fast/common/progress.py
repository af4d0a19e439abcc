"""Progress of a long command: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 10.0

Tell = Callable[[int, int], None]


def progress(command: str, total: int, *, done: int = 0, unit: str = "clip", last_line: bool = True) -> Tell:
    """Show the progress of a command on stderr.

    Args:
        command: its name, for the lines.
        total: total number of units.
        done: number of units done before.
        unit: name of a unit.
        last_line: always write a last line at the end (not on a terminal).

    Returns:
        A function of (newly done, newly bad).
    """
    return _bar(command, total, done, unit) if sys.stderr.isatty() else _lines(command, total, done, unit, last_line)


def _bar(command: str, total: int, done: int, unit: str) -> Tell:
    from tqdm import tqdm

    bar = tqdm(desc=command, total=total, initial=done, unit=unit, dynamic_ncols=True)
    state = {"bad": 0}

    def tell(more: int, bad: int) -> None:
        state["bad"] += bad
        if bad:
            bar.set_postfix(bad=state["bad"], refresh=False)
        bar.update(more + bad)
        if bar.n >= total:
            bar.close()

    return tell


def _lines(command: str, total: int, done: int, unit: str, last_line: bool) -> Tell:
    began = time.monotonic()
    state = {"done": done, "bad": 0, "said": began}

    def tell(more: int, bad: int) -> None:
        state["done"] += more + bad
        state["bad"] += bad
        now, finished = time.monotonic(), last_line and state["done"] >= total
        if now - state["said"] < SECONDS_BETWEEN_LINES and not finished:
            return
        state["said"] = now
        rate = (state["done"] - done) / max(now - began, 1e-9)
        left = duration((total - state["done"]) / rate) if rate else "unknown time"
        counts = f"{state['done']:.0f} of {total} {unit}s, {state['bad']:.0f} bad"
        sys.stderr.write(f"{command}: {counts}, {rate:.1f} {unit}s/s, {left} left\n")
        sys.stderr.flush()

    return tell


def duration(seconds: float) -> str:
    """Seconds in words, such as "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
