"""Kill a small training at random, let it resume, and compare its end with the undisturbed run's, bit for bit.

    python benchmarks/kill_table.py --output kill_table.json [--runs 5] [--kills 3] [--processes 1] [--seed 0]

Each run trains three stages on made-up clips. It is killed `--kills` times with SIGKILL or SIGTERM, at moments drawn
from the seed over the time of the undisturbed run, so that some kills meet a checkpoint, an evaluation or a change of
stage. After each kill the run resumes with `--resume auto`. The table says for each run: whether it finished, whether
its losses and weights equal the undisturbed run's, whether a step is missing or doubled, and the steps done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402

from frozen_fast.common.files import read_rows, write_json  # noqa: E402
from frozen_fast.config import dump_yaml  # noqa: E402
from frozen_fast.records.checkpoint import checkpoint_name, read_tensors  # noqa: E402
from support.runs import environment, make_data, tiny_config, torchrun  # noqa: E402

STEPS = 20
EVERY_STEPS = 4
PATIENCE_SECONDS = 300.0


def write_config(data: dict[str, Path], folder: Path) -> Path:
    """Three stages, with an evaluation at the end of each."""
    config = tiny_config(
        data,
        folder / "run",
        curriculum={"stages": [{"frames": frames, "global_batch_size": 4, "steps": STEPS} for frames in (1, 2, 4)]},
        checkpoints={"every_steps": EVERY_STEPS, "keep": 2},
        evaluation={"every": "stage", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return folder / "config.yaml"


def start(config: Path, processes: int) -> subprocess.Popen[bytes]:
    """One launch of the experiment, resuming where it was left, in a process group of its own."""
    command = [str(ROOT / "train.py"), "--config", str(config), "--resume", "auto"]
    launch = [sys.executable, *command] if processes == 1 else torchrun(*command, processes=processes)
    with (config.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(launch, env=environment(), stdout=log, stderr=log, start_new_session=True)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of steps.jsonl that can be read."""
    return read_rows(run / "steps.jsonl")[0]


def disturb(config: Path, processes: int, kills: int, rng: random.Random) -> tuple[bool, list[str], int]:
    """Kill a run and resume it.

    Returns:
        (whether it finished, the signals in their order, steps that were done twice).
    """
    run, sent, repeated, last = config.parent / "run", [], 0, 0
    for number in range(kills + 1):
        process = start(config, processes)
        deadline = time.monotonic() + PATIENCE_SECONDS
        target = rng.randrange(last, 3 * STEPS)
        while process.poll() is None and time.monotonic() < deadline:
            rows = steps_of(run)
            if number < kills and rows and rows[-1]["step"] >= target and rows[-1]["step"] > last:
                time.sleep(rng.random() * 0.5)
                kind = rng.choice((signal.SIGKILL, signal.SIGTERM))
                os.killpg(process.pid, kind)
                sent.append(kind.name)
                process.wait(PATIENCE_SECONDS)
                break
            time.sleep(0.02)
        if process.poll() == 0:
            return True, sent, repeated
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            return False, sent, repeated
        done = len(steps_of(run))
        saved = json.loads((run / "status.json").read_text()).get("checkpoint") or 0
        repeated += max(0, done - saved)
        last = min(saved, 3 * STEPS - 1)
    return False, sent, repeated


def same_end(run: Path, straight: Path) -> bool:
    """Whether losses and final weights are equal to the last bit."""
    if [row["loss"] for row in steps_of(run)] != [row["loss"] for row in steps_of(straight)]:
        return False
    name = Path("checkpoints") / checkpoint_name(3 * STEPS)
    (weights, _), (expected, _) = read_tensors(run / name), read_tensors(straight / name)
    return all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def main() -> int:
    """Write the table; 1 where a run did not end as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="disturbed runs (default 5)")
    parser.add_argument("--kills", type=int, default=3, help="kills of each run (default 3)")
    parser.add_argument("--processes", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch) / "data")
        straight = write_config(data, Path(scratch) / "straight")
        if start(straight, options.processes).wait(PATIENCE_SECONDS) != 0:
            raise RuntimeError("the undisturbed run failed")
        for number in range(options.runs):
            config = write_config(data, Path(scratch) / f"run_{number}")
            rng = random.Random(options.seed * 1000 + number)
            finished, sent, repeated = disturb(config, options.processes, options.kills, rng)
            steps = [row["step"] for row in steps_of(config.parent / "run")]
            row = {
                "run": number,
                "signals": sent,
                "finished": finished,
                "bit_identical": finished and same_end(config.parent / "run", straight.parent / "run"),
                "every_step_once": steps == list(range(1, 3 * STEPS + 1)),
                "steps_repeated": repeated,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_json(options.output, {"command": sys.argv, "processes": options.processes, "runs": rows})
    return 0 if all(row["bit_identical"] and row["every_step_once"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
