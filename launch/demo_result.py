"""Print the results of the demo's run and the path of its report.

usage: python launch/demo_result.py [--remove] EXPERIMENT.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder


def read_list(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON file of the run folder.

    Raises:
        UserError: the file does not exist.
    """
    if not path.exists():
        raise UserError(
            f"run_folder: got {path.parent}, which has no {path.name}; allowed: the folder of a finished run"
        )
    value = json.loads(path.read_text(encoding="utf-8"))
    return list(value[key] if key else value)


def result_lines(folder: RunFolder, ceiling: float | None) -> list[str]:
    """Lines with retrieval after each stage, the best from one frame, time, memory and the report's path.

    Args:
        folder: a finished run.
        ceiling: the best R@1 in percent that retrieval from one frame per clip can reach, if it is known.
    """
    stages = read_list(folder.stages)
    lines = ["", "text-to-video retrieval on held-out clips:"]
    for row in read_list(folder.metrics, "evaluations"):
        metrics = row["metrics"]
        twins = f", twins told apart {metrics['twin_accuracy']:5.1f} %" if "twin_accuracy" in metrics else ""
        frames = f"{row['frames']} frame" + ("s" if row["frames"] > 1 else " ")
        lines.append(f"  stage {row['stage'] + 1} ({frames}): R@1 {metrics['t2v/R@1']:5.1f} %{twins}")
    if ceiling is not None:
        lines.append(f"  at best from one frame: R@1 {ceiling:5.1f} %, twins told apart  50.0 %")
    training = sum(row["training_seconds"] + row["stall_seconds"] + row["warmup_seconds"] for row in stages)
    memory = max(row["peak_memory_bytes"] or 0 for row in stages)
    lines.append(f"training took {training:.0f} s; peak memory {memory / 2**30:.1f} GiB")
    lines.append(f"report: {(folder.path / 'report.html').resolve()}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", action="store_true", help="remove the run's folder instead")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.experiment, options.overrides)
        folder = RunFolder(config.run_folder.format(name=config.name))
        if options.remove:
            if folder.holds_a_run():  # and nothing else is removed
                shutil.rmtree(folder.path)
            return 0
        ceiling_file = Path(config.evaluation.sources[0].path).parent / "ceiling.json"
        ceiling = json.loads(ceiling_file.read_text(encoding="utf-8"))["R@1"] if ceiling_file.exists() else None
        lines = result_lines(folder, ceiling)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
