"""train.py that is killed after a step, on every rank at once: strategy_worker.py STEP, then train.py's arguments."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from frozen_fast.cli.main import main
from frozen_fast.training.journal import Journal


def killed_after(step: int) -> None:
    """Make the run end with SIGKILL once that step is recorded."""
    original = Journal.add

    def add(self: Journal, result: Any, meter: Any) -> None:
        original(self, result, meter)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = add  # type: ignore[method-assign]


if __name__ == "__main__":
    killed_after(int(sys.argv[1]))
    sys.exit(main(["train", *sys.argv[2:]], program="train.py"))
