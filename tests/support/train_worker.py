"""What torchrun starts in the two-process tests: several runs in one launch, since a launch costs more than a run.

Run as `torchrun ... train_worker.py JOBS.json`; every rank writes JOBS.json.rankN with one outcome per job:
{"code", "error", "message", "seconds"}. A job is {"kind": "train" | "evaluate", "config": mapping, "resume",
"checkpoint", "output", "port": a free one, "fail_on_rank": rank that raises a defect at its second batch, "fault": as
for support.faults}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from frozen_fast.config import config_from_mapping
from frozen_fast.data.load.training_loader import ClipReader
from frozen_fast.training.run import evaluate_checkpoint, train
from support.faults import inject


def run(job: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    outcome: dict[str, Any] = {"code": None, "error": None, "message": ""}
    try:
        config = config_from_mapping(job["config"])
        if job["kind"] == "evaluate":
            evaluate_checkpoint(config, job["checkpoint"], job["output"])
            outcome["code"] = 0
        else:
            outcome["code"] = train(config, resume=job.get("resume", "none"))
    except Exception as error:  # noqa: BLE001 (the test looks at what came out)
        outcome["error"], outcome["message"] = type(error).__name__, str(error)
    return {**outcome, "seconds": time.monotonic() - began}


def break_the_second_batch(patch: pytest.MonkeyPatch) -> None:
    original = ClipReader.read

    def read(self: ClipReader, spec: Any) -> Any:
        if spec.step == 2:
            raise ZeroDivisionError("a defect on one rank")
        return original(self, spec)

    patch.setattr(ClipReader, "read", read)


def main() -> None:
    jobs = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    outcomes = []
    # Every job meets at a port of its own: torchrun's store holds the first meeting's addresses for good.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        with pytest.MonkeyPatch.context() as patch:
            if job.get("fail_on_rank") == rank:
                break_the_second_batch(patch)
            if "fault" in job:
                inject(patch, job["fault"])
            outcomes.append(run(job))
    Path(f"{jobs}.rank{rank}").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
