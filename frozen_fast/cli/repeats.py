"""`--seeds 0,1,2` and `--splits 1,2,3`: `frozen-fast train` and `evaluate` once for each, and their mean."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.errors import UserError

Of = Literal["seed", "split"]


def parse_numbers(text: str, of: Of = "seed") -> list[int]:
    """Turn "0,1,2" into [0, 1, 2].

    Raises:
        UserError: not a list of distinct whole numbers.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise UserError(f"--{of}s: got {text!r}; allowed: distinct whole numbers from 0, such as 0,1,2")
    return numbers


def split_overrides(config: ExperimentConfig, split: int) -> list[str]:
    """What sets split_version of every source that has one.

    Raises:
        UserError: no source has one.
    """
    found = [
        f'{key}[{index}].split_version="{split}"'
        for key, sources in (("data.sources", config.data.sources), ("evaluation.sources", config.evaluation.sources))
        for index, source in enumerate(sources)
        if source.split_version
    ]
    if not found:
        raise UserError("--splits: got sources without a split_version; allowed: a data set with several splits")
    return found


def _one_process(of: Of) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--{of}s: got a launch of several processes; allowed: one")


def train_repeats(config: ExperimentConfig, arguments: argparse.Namespace, of: Of) -> int:
    """Train every seed in RUN_FOLDER/seed_N (split: split_N), in sequence, and write seeds.json, seeds.md, seeds.html.

    Returns:
        The exit code: that of the first failed run, otherwise 0.

    Raises:
        UserError: wrong numbers, no splits, or a launch of several processes.
    """
    from frozen_fast.report.html import to_html
    from frozen_fast.report.markdown import to_markdown
    from frozen_fast.report.over_seeds import folder_of_run, runs_document, runs_summary
    from frozen_fast.report.run_data import read_run

    numbers = parse_numbers(getattr(arguments, f"{of}s"), of)
    _one_process(of)
    folder = Path(config.run_folder.format(name=config.name))
    for number in numbers:
        changes = [f"seed={number}"] if of == "seed" else split_overrides(config, number)
        command = [sys.executable, "-m", "frozen_fast", "train", "--config", arguments.config]
        command += [*arguments.overrides, *changes, f"run_folder={folder_of_run(folder, number, of)}"]
        code = subprocess.run([*command, "--resume", arguments.resume], check=False).returncode
        if code:
            return code
    runs = {number: read_run(folder_of_run(folder, number, of)) for number in numbers}
    document = runs_document(config.name, runs, {"table": config.paper.table, "row": config.paper.row}, of)
    write_json(folder / f"{of}s.json", runs_summary(runs, of))
    write_atomically(folder / f"{of}s.md", to_markdown(document))
    write_atomically(folder / f"{of}s.html", to_html(document))
    print(to_markdown(document))
    return 0


def evaluate_splits(file: str, overrides: Sequence[str], splits: str, output: str | None) -> dict[str, Any]:
    """Evaluate each split on its own sources and summarise.

    A checkpoint RUNS that holds split_1, split_2, .. as `train --splits` writes them gives each split its own run;
    any other checkpoint is evaluated on every split.

    Args:
        file: the experiment.
        overrides: "key.path=value", with model.checkpoint.
        splits: such as "1,2,3".
        output: JSON file for the result.

    Returns:
        {"splits": [{"split", "checkpoint", "evaluations"}], "mean_over_splits": as spread_over by source and protocol}.

    Raises:
        UserError: wrong numbers, no splits, a run of a split is missing, or a launch of several processes.
    """
    from frozen_fast.evaluation.spread import spread_over
    from frozen_fast.report.over_seeds import folder_of_run
    from frozen_fast.training.run import evaluate_checkpoint

    _one_process("split")
    config = load_config(file, overrides)
    numbers = parse_numbers(splits, "split")
    given = Path(str(config.model.checkpoint))
    runs = {number: folder_of_run(given, number, "split") for number in numbers}
    missing = [run for run in runs.values() if not run.is_dir()]
    if missing and len(missing) < len(runs):
        raise UserError(f"--splits: got {splits!r}, but {str(missing[0])!r} does not exist; allowed: trained splits")
    found = []
    for number, run in runs.items():
        own = load_config(file, [*overrides, *split_overrides(config, number)])
        result = evaluate_checkpoint(own, str(given if missing else run))
        found.append({"split": number, **result})
    rows = [row for one in found for row in one["evaluations"]]
    summary = {"splits": found, "mean_over_splits": spread_over(rows, ("source", "protocol"))}
    if output is not None:
        write_json(Path(output), summary)
    return summary
