"""train.py with faults at planned moments: what benchmarks/kill_table.py launches.

    FAULT_FOLDER=FOLDER python fault_worker.py --config FILE --resume auto

FOLDER/plan.json is a list of faults, used one after the other over all starts of the run:

    {"place", "step", "share", "signal", "target", "rank"}

At the first `place` (step, checkpoint, evaluation, stage_change) after `step` optimizer steps, the fault comes after a
`share` of the time that the place took before. `target` says what gets the signal: "all" (the launcher and every rank;
SIGTERM goes to the launcher alone, which passes it on), "rank" (one rank), "launcher". The worker appends to FOLDER:
fired.jsonl (one row for each fault), starts.jsonl (the step that each start begins at) and clips_rank_N.jsonl (the
clips of each step on a rank; a later row of the same step replaces the earlier one).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frozen_fast.cli.main import main
from frozen_fast.common.files import append_json_line, read_rows
from frozen_fast.training import engine
from frozen_fast.training.batch_feed import BatchFeed
from frozen_fast.training.checkpoint_keeper import CheckpointKeeper
from frozen_fast.training.engine import Engine
from frozen_fast.training.optimizer_step import OptimizerStep
from frozen_fast.training.stage_evaluation import StageEvaluation

FIRST_SECONDS = 0.05
"""Time that a place is taken to last before it has been timed."""


class Faults:
    """The planned faults of this process, whose rank and launcher its environment tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = int(os.environ.get("RANK", "0"))
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        (folder / f"pid_{self.rank}").write_text(str(os.getpid()), encoding="utf-8")
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self._waiting = plan[len(read_rows(folder / "fired.jsonl")[0]) :]
        self._seconds: dict[str, float] = {}
        self.engine: Engine | None = None
        self.being_written: int | None = None

    def begin(self, engine: Engine, step: int) -> None:
        """Note that this process starts to train after a number of steps."""
        self.engine = engine
        if self.rank == 0:
            append_json_line(self.folder / "starts.jsonl", {"step": step, "time": time.time()})

    def at(self, place: str, function: Callable[[], Any]) -> Any:
        """Run a place of the training; the next fault comes within it where it is due there."""
        fault = self._waiting[0] if self._waiting else None
        step = 0 if self.engine is None else self.engine.step
        if fault is not None and fault["place"] == place and step >= fault["step"] and self.rank == fault["rank"]:
            self._waiting = []  # one fault in each start
            delay = fault["share"] * self._seconds.get(place, FIRST_SECONDS)
            threading.Thread(target=self._strike, args=(fault, delay), daemon=True).start()
        began = time.monotonic()
        result = function()
        self._seconds[place] = time.monotonic() - began
        return result

    def _strike(self, fault: dict[str, Any], delay: float) -> None:
        time.sleep(delay)
        assert self.engine is not None
        row = {**fault, "at_step": self.engine.step, "being_written": self.being_written, "time": time.time()}
        append_json_line(self.folder / "fired.jsonl", row)
        number = signal.Signals[fault["signal"]]
        if fault["target"] == "rank":
            os.kill(os.getpid(), number)
        elif fault["target"] == "launcher" or (number == signal.SIGTERM and self._launcher is not None):
            os.kill(self._launcher or os.getpid(), number)
        else:
            others = [int(path.read_text()) for path in self.folder.glob("pid_*") if path.name != f"pid_{self.rank}"]
            for pid in [*filter(None, [self._launcher]), *others, os.getpid()]:
                os.kill(pid, number)


def follow(faults: Faults) -> None:
    """Let the training tell `faults` where it is."""
    begin, step, batch, expand = Engine.__init__, OptimizerStep.run, BatchFeed.next_batch, engine.expand_frames
    write, evaluate = CheckpointKeeper._write, StageEvaluation.run

    def begin_and_tell(self: Engine, *arguments: Any) -> None:
        begin(self, *arguments)
        faults.begin(self, self.step)

    def next_batch(self: BatchFeed, *arguments: Any) -> Any:
        found = batch(self, *arguments)
        row = {"step": found[0].spec.step, "clips": found[0].clip_ids}
        append_json_line(faults.folder / f"clips_rank_{faults.rank}.jsonl", row)
        return found

    def write_and_tell(self: CheckpointKeeper, state: Any, *arguments: Any) -> None:
        faults.being_written = state.step
        faults.at("checkpoint", lambda: write(self, state, *arguments))
        faults.being_written = None

    def expand_and_tell(parallel: Any, model: Any, frames: int, method: str) -> None:
        changes = faults.engine is not None and faults.engine.step > 0 and frames > model.learned_frames
        faults.at("stage_change" if changes else "start", lambda: expand(parallel, model, frames, method))

    Engine.__init__ = begin_and_tell  # type: ignore[method-assign]
    BatchFeed.next_batch = next_batch  # type: ignore[method-assign]
    engine.expand_frames = expand_and_tell
    OptimizerStep.run = lambda self, *a, **k: faults.at("step", lambda: step(self, *a, **k))  # type: ignore
    StageEvaluation.run = lambda self, *a, **k: faults.at("evaluation", lambda: evaluate(self, *a, **k))  # type: ignore
    CheckpointKeeper._write = write_and_tell  # type: ignore[method-assign]


def train(*arguments: str) -> int:
    """train.py with the faults of FAULT_FOLDER; returns its exit code."""
    follow(Faults(Path(os.environ["FAULT_FOLDER"])))
    return main(["train", *arguments], program="train.py")


if __name__ == "__main__":
    sys.exit(train(*sys.argv[1:]))
