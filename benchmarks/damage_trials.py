"""Damage files of a run's newest checkpoint at random, and see what `--resume auto` takes.

benchmarks/kill_table.py calls it. Most trials survey the folder as a start does; one in FULL_RUN_EVERY is a whole
`train.py --resume auto` in a process of its own.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.run import find_checkpoint
from support.runs import REPOSITORY, environment

FULL_RUN_EVERY = 20


def flip_one_bit(path: Path, older: Path, rng: random.Random) -> None:
    """One bit anywhere in a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_many_bits(path: Path, older: Path, rng: random.Random) -> None:
    """Up to 1,000 bits of a stretch of the file."""
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content))
    for place in range(first, min(len(content), first + rng.randint(2, 1000))):
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, older: Path, rng: random.Random) -> None:
    """The end of a file is missing."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def zero(path: Path, older: Path, rng: random.Random) -> None:
    """A file of the same size that holds zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, older: Path, rng: random.Random) -> None:
    """The file is missing."""
    path.unlink()


def take_older(path: Path, older: Path, rng: random.Random) -> None:
    """The file is that of the checkpoint before; one bit is flipped where the two are equal."""
    if path.read_bytes() == older.read_bytes():
        flip_one_bit(path, older, rng)
    else:
        shutil.copy(older, path)


HARMS: dict[str, tuple[Callable[[Path, Path, random.Random], None], int]] = {
    "bit flip": (flip_one_bit, 6),
    "many bit flips": (flip_many_bits, 3),
    "truncation": (truncate, 6),
    "zeroed file": (zero, 1),
    "missing file": (delete, 2),
    "file of an older checkpoint": (take_older, 2),
}
"""Name -> (what it does, how often it is drawn)."""


def harm_newest(checkpoints: Path, rng: random.Random) -> tuple[str, Path]:
    """Damage one file of the newest checkpoint; returns (name of the harm, the checkpoint before)."""
    before, newest = sorted(checkpoints.glob("step_*"))[-2:]
    path = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    name = rng.choices(list(HARMS), weights=[weight for _, weight in HARMS.values()])[0]
    HARMS[name][0](path, before / path.relative_to(newest), rng)
    return name, before


def survey_is_right(run: Path, before: Path) -> tuple[bool, bool]:
    """Whether a start (finds the damage, takes the checkpoint before, whose tensors can be read)."""
    found = find_checkpoint(RunFolder(run), "auto")
    detected = len(found.damaged) == 1 and before not in found.damaged
    used = found.usable == before
    if used:
        read_tensors(before)
    return detected, used


def full_run_is_right(run: Path) -> tuple[bool, bool]:
    """Whether `train.py --resume auto` (names the damage, ends well after resuming from the checkpoint before)."""
    train = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(run / "config.yaml"), "--resume", "auto"]
    done = subprocess.run(
        [*train, f"run_folder={run}"], env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    detected = len(list((run / "checkpoints").glob("damaged_step_*"))) == 1 and "Traceback" not in done.stderr
    return detected, done.returncode == 0


def damage_trials(
    straight: Path, work: Path, trials: int, seed: int, same_end: Callable[[Path, Path], bool]
) -> dict[str, Any]:
    """Damage copies of a finished run.

    Args:
        straight: the run's folder, with two checkpoints.
        work: where copies are made.
        trials: copies.
        seed: of the files, harms and places.
        same_end: whether two run folders ended with equal weights, losses and metrics.

    Returns:
        Counts: trials, detected, older_used, full_runs, full_runs_equal, and harms by name.
    """
    counts: Counter[str] = Counter({"detected": 0, "older_used": 0, "full_runs": 0, "full_runs_equal": 0})
    harms: Counter[str] = Counter()
    for number in range(trials):
        rng = random.Random(seed * 100_003 + number)
        run = work / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(straight, run)
        name, before = harm_newest(run / "checkpoints", rng)
        harms[name] += 1
        if number % FULL_RUN_EVERY == 0:
            detected, used = full_run_is_right(run)
            counts["full_runs"] += 1
            counts["full_runs_equal"] += used and same_end(run, straight)
        else:
            detected, used = survey_is_right(run, before)
        counts["detected"] += detected
        counts["older_used"] += used
    return {"trials": trials, **counts, "harms": dict(sorted(harms.items()))}
