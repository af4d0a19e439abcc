"""`frozen-fast find-batch-size`: the largest batch of each number of frames that one device can train."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.errors import UserError

GIBIBYTE = 2**30
RESULT_FILE = "batch_sizes.json"


def find_batch_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `find-batch-size`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one config value")
    parser.add_argument("--frames", metavar="T,T", help="numbers of frames (default: those of the stages)")
    parser.add_argument("--start", type=int, default=8, metavar="B", help="first batch size (default 8)")
    parser.add_argument("--most", type=int, default=4096, metavar="B", help="largest batch size (default 4096)")
    parser.add_argument(
        "--tolerance", type=float, default=0.06, metavar="SHARE", help="relative tolerance of the search (default 0.06)"
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="memory limit; required on a CPU (whole process); default on CUDA: 95 %% of the device's memory",
    )
    parser.add_argument(
        "--trial-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="time limit of a trial; a batch size that exceeds it counts as too large",
    )
    parser.add_argument("--output", metavar="FILE", help=f"default: {RESULT_FILE} in the config's run folder")


def find_batch_size(arguments: argparse.Namespace) -> int:
    """Search per number of frames, print and write the result."""
    from frozen_fast.common.files import write_json

    config = load_config(arguments.config, arguments.overrides)
    frames = _frames(arguments.frames, config)
    device, memory_bytes = _device_and_memory(config, arguments.memory_gib)
    _check_range(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="batch_sizes_") as scratch:
        for number in frames:
            rows.append(_search(arguments, number, device, memory_bytes, Path(scratch)))
    result = {
        "device": next((row["device"] for row in rows if row.get("device")), device),
        "memory_limit_bytes": memory_bytes,
        "per": "device, one process without sharding; captions of model.text.max_tokens",
        "attention": config.model.video.attention,
        "checkpointed_blocks": config.model.video.checkpointed_blocks,
        "compile": config.training.compile,
        "rows": rows,
    }
    output = Path(arguments.output or Path(config.run_folder.format(name=config.name)) / RESULT_FILE)
    write_json(output, result)
    print(f"{'frames':>6} {'batch':>6} {'clips/s':>8} {'GiB':>7}")
    for row in rows:
        memory, speed = row.get("peak_memory_bytes"), row.get("clips_per_second")
        figures = f"{speed:8.1f} {memory / GIBIBYTE:7.2f}" if memory and speed else f"{'-':>8} {'-':>7}"
        print(f"{row['frames']:>6} {row['batch_size']:>6} {figures}")
    print(output)
    return 0


def _search(
    arguments: argparse.Namespace, frames: int, device: str, memory_bytes: int, scratch: Path
) -> dict[str, Any]:
    """The row of one number of frames."""
    from frozen_fast.sweep.batch_size import Attempt, largest_that_fits, try_batch

    attempts: dict[int, Attempt] = {}

    def fits(size: int) -> bool:
        attempt = try_batch(
            arguments.config,
            [*arguments.overrides, f"training.device={device}"],
            frames=frames,
            batch_size=size,
            memory_bytes=memory_bytes,
            seconds=arguments.trial_seconds,
            scratch=scratch,
        )
        attempts[size] = attempt
        sys.stderr.write(f"{frames} frames, batch {size}: {attempt.cause} {attempt.message}\n")
        return attempt.cause == "ok"

    best = largest_that_fits(fits, start=arguments.start, most=arguments.most, tolerance=arguments.tolerance)
    found = attempts[best].figures if best else {}
    return {
        "frames": frames,
        "batch_size": best,
        **{key: found.get(key) for key in ("peak_memory_bytes", "clips_per_second", "device", "precision")},
        "attempts": [attempt.to_row() for attempt in attempts.values()],
    }


def _frames(text: str | None, config: ExperimentConfig) -> list[int]:
    if text is None:
        return sorted({stage.frames for stage in config.curriculum.stages})
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--frames: got {text!r}; allowed: positive whole numbers separated by commas")
    return sorted({int(part) for part in parts})


def _check_range(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.start <= arguments.most:
        raise UserError(f"--start: got {arguments.start}; allowed: 1 to --most, which is {arguments.most}")
    if not 0 <= arguments.tolerance <= 1:
        raise UserError(f"--tolerance: got {arguments.tolerance}; allowed: 0 to 1")


def _device_and_memory(config: ExperimentConfig, gibibytes: float | None) -> tuple[str, int]:
    """The device's name for training.device, and the limit in bytes."""
    import torch

    if gibibytes is not None and gibibytes <= 0:
        raise UserError(f"--memory-gib: got {gibibytes}; allowed: above 0")
    device = config.training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if gibibytes is not None:
        return device, int(gibibytes * GIBIBYTE)
    if device == "cpu":
        raise UserError("--memory-gib: got none; allowed on a CPU: a limit in GiB, below the machine's memory")
    if not torch.cuda.is_available():
        raise UserError("training.device: got cuda; allowed here: auto, cpu (there is no CUDA device)")
    return device, int(0.95 * torch.cuda.get_device_properties(0).total_memory)
