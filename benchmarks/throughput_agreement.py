"""Compares throughput.py's projection with the meter of a training run, alternating between the two.

    python benchmarks/throughput_agreement.py --output benchmarks/results/throughput_agreement_cpu.json

Each round trains a short run of the stages with train.py and then measures every stage end to end as throughput.py
does: the same model, engine, clips, batch sizes and launcher. The run's meter charges training and stall; its warm-up
steps, checkpoints and what lies between the steps are told apart and are no part of the comparison, as they are no
part of a projection. Exit code 1 where the two differ by more than 5 % over all rounds.

On a CPU that others use too, the load changes between the two. --steady-load then keeps both on half of the cores and
the other half busy, which leaves other work (at a lower priority: start this with `nice -n -12`) little to change.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clips import data_manifest
from measure import describe_machine, pick_device
from throughput import ROOT, StageKey, add_stage_arguments, launched, measure_stage, settings
from throughput_report import markdown, number, project, speed

from frozen_fast.common.files import write_json
from frozen_fast.errors import UserError
from frozen_fast.sweep.outcome import telling_line
from frozen_fast.sweep.process import run_limited

TOLERANCE = 0.05
MODE = "end_to_end"
BURNER = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
import torch
torch.set_num_threads(1)
square = torch.randn(1024, 1024)
while True:
    square @ square
"""
PARTS = ("training", "stall", "warmup", "checkpoint", "other")


@contextmanager
def steady_load() -> Iterator[None]:
    """Keep this process and all that it starts on half of its cores, and the others busy with matrix products."""
    cores = sorted(os.sched_getaffinity(0))
    busy = cores[(len(cores) + 1) // 2 :]
    burners = [subprocess.Popen([sys.executable, "-c", BURNER, str(core)]) for core in busy]
    os.sched_setaffinity(0, set(cores) - set(busy))
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        os.sched_setaffinity(0, cores)


def parse_stages(text: str) -> list[tuple[int, int, int]]:
    """Stages as (frames, clips of a batch, optimizer steps) from "1=32x60,4=16x60".

    Raises:
        UserError: another form.
    """
    stages = []
    for part in text.split(","):
        try:
            frames, rest = part.split("=")
            batch_size, steps = rest.split("x")
            stages.append((int(frames), int(batch_size), int(steps)))
        except ValueError:
            raise UserError(f"--stages: got {text!r}; allowed: FRAMES=CLIPSxSTEPS,..., as in 1=32x60,4=16x60") from None
    return stages


def train(
    options: argparse.Namespace, stages: Sequence[tuple[int, int, int]], manifest: Path, folder: Path
) -> list[dict[str, Any]]:
    """A short run with train.py; its stages.json.

    Raises:
        UserError: the run failed.
    """
    listed = [{"frames": frames, "global_batch_size": size, "steps": steps} for frames, size, steps in stages]
    command = launched(
        options,
        ROOT / "train.py",
        "--config",
        str(options.config),
        *settings(options, manifest, options.attention),
        f"curriculum.stages={json.dumps(listed)}",
        "curriculum.budget_epochs=null",
        "curriculum.budget_clips=null",
        "checkpoints.every_steps=0",
        "checkpoints.keep=1",
        f"run_folder={folder}",
    )
    log = folder.with_suffix(".log")
    environment = {"HF_HUB_OFFLINE": "1"}
    result = run_limited(
        command, folder=Path.cwd(), environment=environment, log=log, seconds=options.stage_seconds, memory_bytes=None
    )
    if result.exit_code != 0:
        raise UserError(f"the run failed: {telling_line(log.read_text(errors='replace'))}")
    rows: list[dict[str, Any]] = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return rows


def one_round(
    options: argparse.Namespace, stages: Sequence[tuple[int, int, int]], manifest: Path, folder: Path
) -> list[dict[str, Any]]:
    """Train, then measure; per stage what the meter and the windows said.

    Raises:
        UserError: the run or a measurement failed.
    """
    folder.mkdir()
    metered = train(options, stages, manifest, folder / "run")
    rows = []
    for stage, (frames, batch_size, steps) in zip(metered, stages, strict=True):
        key = StageKey(frames=frames, batch_size=batch_size, attention=options.attention)
        measured = measure_stage(key, options, manifest, folder)
        if measured["cause"] != "ok":
            raise UserError(f"{frames} frames: {measured['cause']}: {measured['message']}")
        timed_seconds = stage["training_seconds"] + stage["stall_seconds"]
        rows.append(
            {
                "frames": frames,
                "batch_size": batch_size,
                "steps": steps,
                "num_devices": stage["num_devices"],
                "run": {
                    "clips": stage["clips"],
                    "timed_clips": round(stage["clips_per_second"] * timed_seconds),
                    "seconds": stage["seconds"],
                    "stall_share": stage["stall_share"],
                    **{f"{part}_seconds": stage[f"{part}_seconds"] for part in PARTS},
                },
                "modes": measured["modes"],
                "precision": measured["precision"],
                "device": measured["device"],
            }
        )
    return rows


def compare(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per stage over all rounds, and for the whole: the meter's GPU-hours of training and stall, and the projection.

    The clips are those of the run's steps after warm-up, which its meter charges as training and stall.
    """
    rows = []
    for stages in zip(*rounds, strict=True):
        first = stages[0]
        windows = [window for stage in stages for window in stage["modes"][MODE]["windows"]]
        pooled = {"num_devices": first["num_devices"], "modes": {MODE: {"windows": windows}}}
        clips = sum(stage["run"]["timed_clips"] for stage in stages)
        seconds = sum(stage["run"]["training_seconds"] + stage["run"]["stall_seconds"] for stage in stages)
        projection, rate = project(clips, pooled, MODE), speed(pooled, MODE)
        assert projection is not None and rate is not None
        rows.append(
            {
                "stage": f"{first['frames']} frames, batch {first['batch_size']}",
                "clips": clips,
                "run_clips_per_second": clips / seconds,
                "windows_clips_per_second": rate,
                "windows": len(windows),
                "run_gpu_hours": seconds * first["num_devices"] / 3600,
                "projected_gpu_hours": projection["median"],
            }
        )
    total = {name: sum(row[name] for row in rows) for name in ("clips", "run_gpu_hours", "projected_gpu_hours")}
    rows.append({"stage": "whole run", **total})
    return [{**row, "difference": row["projected_gpu_hours"] / row["run_gpu_hours"] - 1} for row in rows]


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown, and where the rest of the runs' wall time went."""
    lines = [
        [
            "stage",
            "clips",
            "run: clips/s",
            "windows: clips/s (p20-p80)",
            "run's meter: GPU-hours",
            "projected: GPU-hours",
            "difference",
        ]
    ]
    for row in result["agreement"]:
        rate = row.get("windows_clips_per_second")
        spread = f"{rate['median']:.2f} ({rate['p20']:.2f}-{rate['p80']:.2f})" if rate else ""
        metered = number(row["run_clips_per_second"], "{:.2f}") if rate else ""
        hours = [f"{row['run_gpu_hours']:.5f}", f"{row['projected_gpu_hours']:.5f}"]
        lines.append([row["stage"], str(row["clips"]), metered, spread, *hours, f"{row['difference']:+.1%}"])
    runs = [stage["run"] for stages in result["rounds"] for stage in stages]
    whole = sum(run["seconds"] for run in runs)
    shares = ", ".join(f"{part} {sum(run[f'{part}_seconds'] for run in runs) / whole:.1%}" for part in PARTS)
    held = " Half of the cores were used, and the others were kept busy." if result["steady_load"] else ""
    return (
        f"{len(result['rounds'])} rounds, each a run and its measurement. The table compares training and stall of the "
        f"meter with the projection for the same clips.{held}\n\n{markdown(lines)}\n\nWall time of the runs: {shares}."
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="1=32x60,4=16x60", help="FRAMES=CLIPSxSTEPS,...: the run's curriculum")
    parser.add_argument("--attention", default="sdpa", help="attention backend of both")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds, each a run and its measurement")
    parser.add_argument("--steady-load", action="store_true", help="half of the cores for this, the others kept busy")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput_agreement/agreement.json"))
    add_stage_arguments(parser)
    options = parser.parse_args(arguments)
    options.modes, options.logs = [MODE], Path("runs/throughput_agreement/logs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 0 where the two agree, 1 where they do not, 2 for a mistake or a failed run."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is in a session of its own
    try:
        stages = parse_stages(options.stages)
        with tempfile.TemporaryDirectory() as scratch:
            manifest = data_manifest(options.data, Path(scratch), small=options.small)
            with steady_load() if options.steady_load else nullcontext():
                rounds = [
                    one_round(options, stages, manifest, Path(scratch) / f"round_{index}")
                    for index in range(options.rounds)
                ]
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    result = {
        "command": ["python", "benchmarks/throughput_agreement.py", *(arguments or sys.argv[1:])],
        "machine": describe_machine(pick_device("auto")),
        "small": options.small,
        "tolerance": TOLERANCE,
        "steady_load": options.steady_load,
        "agreement": compare(rounds),
        "rounds": rounds,
    }
    write_json(options.output, result)
    print(table(result))
    return int(abs(result["agreement"][-1]["difference"]) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
