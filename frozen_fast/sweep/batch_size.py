"""The largest batch that fits: grow until a trial runs out of memory, then bisect. Each trial is its own process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError
from frozen_fast.sweep.outcome import classify, telling_line
from frozen_fast.sweep.process import run_limited

TRIAL_MODULE = "frozen_fast.training.trial"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One trial: its batch size, "ok" or the cause of its failure, and its measurements."""

    batch_size: int
    cause: str
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """Return a row of plain values."""
        return asdict(self)


def largest_that_fits(fits: Callable[[int], bool], *, start: int, most: int, tolerance: float) -> int:
    """The largest size that fits, to within a tolerance.

    Args:
        fits: whether a size fits; taken to be true up to some size and false beyond it. Asked at most once per size.
        start: the first size; it grows twofold from there.
        most: no larger size is tried.
        tolerance: the search ends when the next size to try is within this share of the last that fitted.

    Returns:
        A size that fits, 0 where not even 1 does.
    """
    fitting, size = 0, min(start, most)
    while fits(size):
        fitting = size
        if size == most:
            return size
        size = min(2 * size, most)
    failing = size
    while failing - fitting > max(1, int(tolerance * fitting)):
        size = (fitting + failing) // 2
        fitting, failing = (size, failing) if fits(size) else (fitting, size)
    return fitting


def try_batch(
    config: str,
    overrides: Sequence[str],
    *,
    frames: int,
    batch_size: int,
    memory_bytes: int | None,
    seconds: float,
    scratch: Path,
) -> Attempt:
    """Run one trial with a limit on its memory (the whole process on a CPU, the allocator on CUDA).

    Raises:
        UserError: a mistake in the config, or a failure that is not for want of memory.
    """
    output, log = scratch / f"T{frames}_B{batch_size}.json", scratch / f"T{frames}_B{batch_size}.log"
    limit = ["--memory-bytes", str(memory_bytes)] if memory_bytes is not None else []
    command = [
        sys.executable,
        "-m",
        TRIAL_MODULE,
        "--config",
        config,
        "--frames",
        str(frames),
        "--batch-size",
        str(batch_size),
        "--output",
        str(output),
        *limit,
        *overrides,
    ]
    on_cpu = "training.device=cpu" in overrides
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # a checkout that is not installed works too
    result = run_limited(
        command,
        folder=Path.cwd(),
        environment=variables,
        log=log,
        seconds=seconds,
        memory_bytes=memory_bytes if on_cpu else None,
    )
    text = log.read_text(encoding="utf-8", errors="replace")
    cause = classify(result.exit_code, text, timed_out=result.timed_out, over_memory=result.over_memory)
    if cause == "ok":
        return Attempt(batch_size=batch_size, cause=cause, figures=json.loads(output.read_text(encoding="utf-8")))
    if cause == "refused":
        raise UserError(telling_line(text).removeprefix("error: "))
    if cause not in ("out_of_memory", "timeout"):
        raise UserError(f"frames {frames}, batch size {batch_size}: the trial failed ({cause}): {telling_line(text)}")
    return Attempt(batch_size=batch_size, cause=cause, message=telling_line(text))
