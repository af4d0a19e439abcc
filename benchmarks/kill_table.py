"""Kill a small training at random, let it resume, and compare its end with the undisturbed run's, bit for bit.

    python benchmarks/kill_table.py --output benchmarks/results/kill_table.json [--runs 25] [--faults 3] [--seed 0]

Each run trains three stages on made-up clips, on one or two processes of the CPU: alone, under DDP, ZeRO-2 or FSDP2.
Faults come at places and moments drawn from the seed: within a step, while a checkpoint is written, in an evaluation,
at a change of stage. A fault is SIGKILL of every process, SIGTERM, the loss of one rank (the launcher starts the ranks
again, max_restarts), or the loss of the launcher. Every start resumes with `--resume auto`. Half of the runs write
checkpoints asynchronously.

For each run the file says: whether it finished; whether losses, metrics, weights and optimizer state equal the
undisturbed run's of the same strategy; whether the clips of every step do; the steps that each fault cost. After the
runs the newest checkpoint of an undisturbed run is damaged `--damages` times (benchmarks/damage_trials.py).

With `--fork` the launcher and the ranks are forked from a process that has imported everything, instead of started
again: Accelerate's launcher and torch's elastic agent run as they are, and each start takes a few seconds less.

The file is written after every run; a second call with the same settings continues it.
benchmarks/results_tables.py puts the table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]


import torch.distributed.run  # noqa: E402
from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: E402
from damage_trials import damage_trials  # noqa: E402
from measure import describe_machine  # noqa: E402

from frozen_fast.common.files import read_rows, write_json  # noqa: E402
from frozen_fast.config import dump_yaml  # noqa: E402
from frozen_fast.records.checkpoint import checkpoint_name, read_tensors  # noqa: E402
from frozen_fast.records.run_folder import RunFolder  # noqa: E402
from frozen_fast.records.run_lock import is_alive  # noqa: E402
from support import fault_worker  # noqa: E402
from support.runs import environment, make_data, tiny_config  # noqa: E402

WORKER = ROOT / "tests" / "support" / "fault_worker.py"
VIDEOS, BATCH, STAGE_STEPS, STAGES, EVERY_STEPS = 24, 4, 12, 3, 4
STEPS = STAGES * STAGE_STEPS
PATIENCE_SECONDS = 600.0
PR_SET_PDEATHSIG = 1
LAUNCHES: dict[str, tuple[str | None, int]] = {
    "one process": (None, 1),
    "ddp, 2 ranks": ("cpu_2", 2),
    "zero2, 2 ranks": ("cpu_2_zero2", 2),
    "fsdp2, 2 ranks": ("cpu_2_fsdp2", 2),
    "zero2, 1 rank": ("cpu_2_zero2", 1),
    "fsdp2, 1 rank": ("cpu_2_fsdp2", 1),
}
"""Name -> (file in configs/accelerate, or None: no launcher; processes)."""
ORDER = (*LAUNCHES, *tuple(LAUNCHES)[:4], *tuple(LAUNCHES)[:4])
PLACES = ("step", "checkpoint", "evaluation", "stage_change")


def write_config(data: dict[str, Path], folder: Path, *, asynchronous: bool) -> Path:
    """Three stages, with an evaluation at the end of each."""
    config = tiny_config(
        data,
        folder / "run",
        curriculum={
            "stages": [{"frames": frames, "global_batch_size": BATCH, "steps": STAGE_STEPS} for frames in (1, 2, 4)]
        },
        checkpoints={"every_steps": EVERY_STEPS, "keep": 2, "asynchronous": asynchronous},
        evaluation={"every": "stage", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return folder / "config.yaml"


def command(config: Path, launch: str) -> list[str]:
    """The command line of one launch, which resumes what is there."""
    file, processes = LAUNCHES[launch]
    train = [str(WORKER), "--config", str(config), "--resume", "auto"]
    if file is None:
        return [sys.executable, *train]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    accelerate += [str(ROOT / "configs" / "accelerate" / f"{file}.yaml"), "--num_processes", str(processes)]
    return [*accelerate, "--max_restarts", "3", *train]


def run_once(config: Path, launch: str, fork: bool) -> int | None:
    """Launch, and wait until every process is gone; returns the exit code, None after PATIENCE_SECONDS."""
    folder = config.parent
    process: subprocess.Popen[bytes] | BaseProcess
    if fork:
        process = multiprocessing.get_context("fork").Process(target=launch_here, args=(config, launch))
        process.start()
    else:
        variables = environment(FAULT_FOLDER=str(folder))
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command(config, launch), env=variables, stdout=log, stderr=log, cwd=ROOT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    # Ranks whose launcher was killed save a checkpoint first.
    while (code := exit_code(process)) is None or is_alive(RunFolder(folder / "run")):
        if time.monotonic() > deadline:
            process.kill()
            return None
        time.sleep(0.1)
    return code


def exit_code(process: subprocess.Popen[bytes] | BaseProcess) -> int | None:
    """A process's exit code; None while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def launch_here(config: Path, launch: str) -> None:
    """One launch in this process, a fork of the driver, which it ends."""
    with (config.parent / "log.txt").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(environment(FAULT_FOLDER=str(config.parent)))
    os.chdir(ROOT)
    words = command(config, launch)
    if LAUNCHES[launch][0] is None:
        sys.exit(fault_worker.train(*words[2:]))
    start = torch.distributed.run.elastic_launch

    def fork_ranks(config: Any, entrypoint: str) -> Any:
        return start(dataclasses.replace(config, start_method="fork"), run_rank)

    torch.distributed.run.elastic_launch = fork_ranks  # type: ignore[attr-defined, assignment]
    launch_command(launch_command_parser().parse_args(words[3:]))


def run_rank(*words: str) -> None:
    """A forked rank; `words` are the command line that the launcher would have started."""
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, 0
    )  # torch's fork asks for SIGINT when the launcher dies, torchrun does not
    code = fault_worker.train(*words[words.index("--config") :])
    logging.shutdown()
    sys.stderr.flush()
    if code:
        os._exit(code)


def draw_faults(rng: random.Random, launch: str, count: int, offset: int) -> list[dict[str, Any]]:
    """A plan for fault_worker.py; `offset` spreads the places and kinds evenly over the runs."""
    file, processes = LAUNCHES[launch]
    kinds = [("SIGKILL", "all"), ("SIGTERM", "all")]
    kinds += [("SIGKILL", "launcher")] if file else []
    kinds += [("SIGKILL", "rank"), ("SIGKILL", "rank")] if processes > 1 else []
    faults = []
    for number in range(offset, offset + count):
        place = PLACES[number % len(PLACES)]
        signal_name, target = rng.choice(kinds)
        steps = {
            "step": range(STEPS),
            "checkpoint": range(1, STEPS + 1),
            "evaluation": range(STAGE_STEPS, STEPS + 1, STAGE_STEPS),
            "stage_change": range(STAGE_STEPS, STEPS, STAGE_STEPS),
        }[place]
        # Only rank 0 writes checkpoints.
        rank = rng.randrange(processes) if target == "rank" and place != "checkpoint" else 0
        fault = {"place": place, "step": rng.choice(steps), "share": round(rng.random(), 3), "signal": signal_name}
        faults.append({**fault, "target": target, "rank": rank})
    return sorted(faults, key=lambda fault: (fault["step"], PLACES.index(fault["place"])))


def disturb(config: Path, launch: str, faults: list[dict[str, Any]], fork: bool) -> tuple[bool, int]:
    """Run to the end through the faults; returns (whether it finished, launches)."""
    write_json(config.parent / "plan.json", faults)
    for launches in range(1, len(faults) + 3):
        code = run_once(config, launch, fork)
        if code in (0, None):
            return code == 0, launches
    return False, launches


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file that can be read."""
    return read_rows(path)[0]


def lost_steps(folder: Path) -> list[dict[str, Any]]:
    """Each fault that came, with the steps that were done again because of it, and how many may be.

    A checkpoint that was being written when the fault came does not count, nor do the steps made meanwhile.
    """
    starts, found = rows_of(folder / "starts.jsonl"), []
    for fault in rows_of(folder / "fired.jsonl"):
        after = next((start["step"] for start in starts if start["time"] > fault["time"]), None)
        writing = fault["being_written"]
        allowed = EVERY_STEPS + (0 if writing is None else fault["at_step"] - writing)
        lost = None if after is None else max(0, fault["at_step"] - after)
        kept = {key: fault[key] for key in ("place", "signal", "target", "at_step")}
        found.append({**kept, "lost_steps": lost, "allowed_steps": allowed})
    return found


def clips_of(folder: Path, processes: int) -> dict[int, list[str]]:
    """Step -> the clips of all ranks in the batch that counted."""
    found: dict[int, list[str]] = {}
    for rank in range(processes):
        last = {row["step"]: row["clips"] for row in rows_of(folder / f"clips_rank_{rank}.jsonl")}
        for step, clips in last.items():
            found.setdefault(step, []).extend(clips)
    return found


def clips_are_exact(folder: Path, straight: Path, processes: int) -> bool:
    """Whether every step used the undisturbed run's clips, and every clip was used equally often."""
    found = clips_of(folder, processes)
    used = [clip for clips in found.values() for clip in clips]
    times = STEPS * BATCH // VIDEOS
    even = all(used.count(clip) == times for clip in set(used)) and len(used) == STEPS * BATCH
    return even and found == clips_of(straight, processes)


def same_end(run: Path, straight: Path) -> bool:
    """Whether losses, metrics, weights and optimizer state are equal to the last bit."""
    found, wanted = ([(row["step"], row["loss"]) for row in rows_of(path / "steps.jsonl")] for path in (run, straight))
    if found != wanted or [step for step, _ in found] != list(range(1, STEPS + 1)):
        return False
    (first, second) = (json.loads((path / "metrics.json").read_text())["evaluations"] for path in (run, straight))
    if [(row["step"], row["metrics"]) for row in first] != [(row["step"], row["metrics"]) for row in second]:
        return False
    name = Path("checkpoints") / checkpoint_name(STEPS)
    (weights, state), (expected, expected_state) = read_tensors(run / name), read_tensors(straight / name)
    same = all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    return same and all(
        torch.equal(state[key][part], tensor) for key, parts in expected_state.items() for part, tensor in parts.items()
    )


def undisturbed(data: dict[str, Path], work: Path, launch: str, fork: bool) -> Path:
    """The folder of a run without faults; made once."""
    folder = work / ("straight_" + launch.replace(", ", "_").replace(" ", "_"))
    if RunFolder(folder / "run").last_status().get("state") != "done":
        shutil.rmtree(folder, ignore_errors=True)
        config = write_config(data, folder, asynchronous=True)
        finished, _ = disturb(config, launch, [], fork)
        if not finished:
            raise RuntimeError(f"the undisturbed run failed: {folder / 'log.txt'}")
    return folder


def disturbed_row(data: dict[str, Path], work: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the table."""
    launch = ORDER[number % len(ORDER)]
    straight = undisturbed(data, work, launch, options.fork)
    folder = work / f"run_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    asynchronous = number // len(LAUNCHES) % 2 == 0
    config = write_config(data, folder, asynchronous=asynchronous)
    rng = random.Random(options.seed * 1000 + number)
    began = time.monotonic()
    plan = draw_faults(rng, launch, options.faults, number * options.faults)
    finished, launches = disturb(config, launch, plan, options.fork)
    faults = lost_steps(folder)
    good = {
        "finished": finished,
        "bit_identical": finished and same_end(folder / "run", straight / "run"),
        "clips_exact": finished and clips_are_exact(folder, straight, LAUNCHES[launch][1]),
        "within_interval": all(
            fault["lost_steps"] is not None and fault["lost_steps"] <= fault["allowed_steps"] for fault in faults
        ),
    }
    return {
        "run": number,
        "launch": launch,
        "asynchronous": asynchronous,
        "faults": faults,
        "launches": launches,
        "starts": len(rows_of(folder / "starts.jsonl")),
        **good,
        "good": all(good.values()),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Write the file; 1 where a run or a damage did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to continue")
    parser.add_argument("--runs", type=int, default=25, help="disturbed runs (default 25)")
    parser.add_argument("--faults", type=int, default=3, help="faults of each run (default 3)")
    parser.add_argument(
        "--damages", type=int, default=100, help="damaged copies of the newest checkpoint (default 100)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of faults and damages")
    parser.add_argument("--work", type=Path, help="folder of the runs, kept (default: a temporary one)")
    parser.add_argument("--fork", action="store_true", help="fork launchers and ranks: much less to import")
    options = parser.parse_args()
    settings = {"seed": options.seed, "faults": options.faults, "steps": STEPS, "every_steps": EVERY_STEPS}
    settings["fork"] = options.fork
    result: dict[str, Any] = {"machine": describe_machine(torch.device("cpu")), "command": _command(), "runs": []}
    if options.output.exists():
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        result = earlier if earlier.get("settings") == settings else result
    result["settings"] = settings
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        data = make_data(work / "data", videos=VIDEOS)
        for number in range(len(result["runs"]), options.runs):
            result["runs"].append(disturbed_row(data, work, number, options))
            write_json(options.output, result)
            print(json.dumps(result["runs"][-1]), flush=True)
        if options.damages and "damage" not in result:
            straight = undisturbed(data, work, "one process", options.fork) / "run"
            result["damage"] = damage_trials(straight, work, options.damages, options.seed, same_end)
            write_json(options.output, result)
            print(json.dumps(result["damage"]), flush=True)
    damage = result.get("damage", {"trials": 0, "detected": 0, "older_used": 0, "full_runs": 0, "full_runs_equal": 0})
    whole = damage["detected"] == damage["older_used"] == damage["trials"]
    whole = whole and damage["full_runs"] == damage["full_runs_equal"]
    return 0 if all(row["good"] for row in result["runs"]) and whole else 1


def _command() -> list[str]:
    """This command line; of absolute paths only the last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return ["python", "benchmarks/kill_table.py", *words]


if __name__ == "__main__":
    sys.exit(main())
