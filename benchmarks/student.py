"""A student of few frames beside the same student without a teacher: accuracy and training hours.

    python benchmarks/student.py --teacher runs/demo                  # the demo's model of 8 frames, students of 1
    python benchmarks/student.py --teacher runs/own --frames 1 --steps 2000 --seeds 0 1 2

The students train with the teacher's config, from random weights, for the same number of steps of one stage; the
distilled one also learns the similarities of the frozen teacher, which reads all of its frames. Runs lie under --work,
one folder each: a finished one is not trained again, and the same command continues a stopped one. The hours of the
distilled student include the teacher's forward passes; the teacher's own training is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.curriculum import mean_and_spread, measured, state_of
from benchmarks.measure import ROOT, pick_device, write_result
from frozen_fast.config import load_config
from frozen_fast.errors import UserError

KINDS = ("plain", "distilled")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a finished run folder")
    parser.add_argument("--frames", type=int, default=1, help="of the students")
    parser.add_argument("--steps", type=int, default=440, help="of each student")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--weight", type=float, default=100.0, help="distillation.weight: cosines differ by little")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/student"), help="run folders")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/student.json"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, for both students")
    return parser.parse_args(arguments)


def overrides_of(options: argparse.Namespace, kind: str, seed: int, teacher_frames: int) -> list[str]:
    """What turns the teacher's config into one student's run."""
    stage = {"frames": options.frames, "global_batch_size": options.batch_size, "steps": options.steps}
    teacher = {"checkpoint": str(options.teacher.resolve()), "frames": teacher_frames}
    taught = [teacher] if kind == "distilled" else []
    return [
        f"name=student_{kind}_seed{seed}",
        f"run_folder={json.dumps(str(options.work / f'{kind}_seed{seed}'))}",
        f"seed={seed}",
        "paper_row=none",
        "curriculum.budget_clips=null",
        "curriculum.budget_epochs=null",
        f"curriculum.stages={json.dumps([stage])}",
        "evaluation.every=end",
        "evaluation.keep_best=none",
        f"distillation.teachers={json.dumps(taught)}",
        f"distillation.weight={options.weight}",
        *options.overrides,
    ]


def train(options: argparse.Namespace, kind: str, seed: int, teacher_frames: int) -> dict[str, Any]:
    """Train one student unless that is done; what its run folder says.

    Raises:
        UserError: the run did not finish.
    """
    folder = options.work / f"{kind}_seed{seed}"
    if state_of(folder) != "done":
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(options.teacher / "config.yaml")]
        command += ["--resume", "auto", *overrides_of(options, kind, seed, teacher_frames)]
        environment = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            raise UserError(f"{folder}: got exit code {code}; allowed: 0 (the same command continues a stopped run)")
    return {"kind": kind, "seed": seed, **measured(folder)}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a kind: hours and metrics as mean and sample standard deviation over the seeds."""
    entries = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        entries.append(
            {
                "kind": kind,
                "frames": own[0]["frames"],
                "seeds": len(own),
                "hours": mean_and_spread([run["hours"] for run in own]),
                "metrics": {name: mean_and_spread([run["metrics"][name] for run in own]) for name in own[0]["metrics"]},
            }
        )
    return entries


def main(arguments: list[str]) -> int:
    """Train the students, write the result file, print the summary."""
    options = parse_arguments(arguments)
    if state_of(options.teacher) != "done":
        raise UserError(f"--teacher: got {str(options.teacher)!r}; allowed: the folder of a finished run")
    config = load_config(str(options.teacher / "config.yaml"))
    teacher_frames = max(stage.frames for stage in config.curriculum.stages)
    if not 1 <= options.frames <= teacher_frames:
        raise UserError(f"--frames: got {options.frames}; allowed: 1 to {teacher_frames}, those of the teacher")
    runs = [{"kind": "teacher", "seed": config.seed, **measured(options.teacher)}]
    runs += [train(options, kind, seed, teacher_frames) for seed in options.seeds for kind in KINDS]
    result = {"rows": summary(runs), "runs": runs}
    write_result(options.output, pick_device("auto"), vars(options), result)
    for row in result["rows"]:
        metrics = ", ".join(f"{name} {mean:.1f} ({spread:.1f})" for name, (mean, spread) in row["metrics"].items())
        print(f"{row['kind']}, {row['frames']} frames: {row['hours'][0]:.4f} hours; {metrics}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
