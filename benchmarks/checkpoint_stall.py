"""How long a checkpoint holds up training, written by a thread or not, and the memory that its snapshot takes.

    python benchmarks/checkpoint_stall.py --output checkpoint_stall.json [--size small_patch16_224] [--steps 24]

Three runs of the same training on made-up clips: without checkpoints, with a checkpoint every --every steps by a
thread (checkpoints.asynchronous), and the same without the thread. For each: the median step, the time in which
training pauses for one checkpoint, that time as a share of a step and of the steps between two checkpoints at the
default interval (checkpoints.every_steps), and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from measure import pick_device, write_result  # noqa: E402

from frozen_fast.common.files import read_rows  # noqa: E402
from frozen_fast.config import dump_yaml  # noqa: E402
from frozen_fast.config.schema import CheckpointConfig  # noqa: E402
from support.runs import environment, make_data, read_json, tiny_config  # noqa: E402

FORMS: dict[str, dict[str, Any]] = {
    "without checkpoints": {"every_steps": 0},
    "by a thread": {"asynchronous": True},
    "in the step": {"asynchronous": False},
}


def run(
    options: argparse.Namespace, data: dict[str, Path], folder: Path, checkpoints: dict[str, Any]
) -> dict[str, Any]:
    """Train in a process of its own; its figures."""
    config = tiny_config(
        data,
        folder / "run",
        model={
            "video": {"size": options.size, "attention": "auto"},
            "text": {"name": str(data["tower"]), "max_tokens": 12},
        },
        curriculum={"stages": [{"frames": 1, "global_batch_size": options.batch_size, "steps": options.steps}]},
        checkpoints={"every_steps": options.every, "every_minutes": 0, **checkpoints},
        training={"device": options.device, "log_every_steps": 1},
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(folder / "config.yaml")]
    variables = environment(OMP_NUM_THREADS=str(options.threads)) if options.threads else environment()
    subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps, _ = read_rows(folder / "run" / "steps.jsonl")
    (stage,) = read_json(folder / "run" / "stages.json")
    every = config.checkpoints.every_steps or options.steps
    saved = -(-options.steps // every)  # the stage's end included
    stall = stage["checkpoint_seconds"] / saved
    step = statistics.median(row["seconds"] for row in steps if not row["warmup"])
    return {
        "step_seconds": step,
        "checkpoints": saved,
        "stall_seconds": stall,
        "stall_over_step": stall / step,
        "stall_share_at_default_interval": stall / (CheckpointConfig().every_steps * step),
        "peak_memory_bytes": stage["peak_memory_bytes"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the three forms and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", default="small_patch16_224", help="of the video tower")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="checkpoint_stall_") as scratch:
        data = make_data(Path(scratch) / "data")
        rows = {
            name: run(options, data, Path(scratch) / str(index), checkpoints)
            for index, (name, checkpoints) in enumerate(FORMS.items())
        }
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:20} step {row['step_seconds']:.3f} s, stall {row['stall_seconds']:.3f} s a checkpoint "
            f"({100 * row['stall_over_step']:.1f} % of a step, {100 * row['stall_share_at_default_interval']:.3f} % of "
            f"the time at the default interval), peak {row['peak_memory_bytes'] / 2**30:.2f} GiB\n"
        )
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        write_result(options.output, pick_device(options.device), settings, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
