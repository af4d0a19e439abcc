"""`frozen-fast train --seeds 0,1,2`: one run per seed, each in its own process, and their mean and deviation."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError


def parse_seeds(text: str) -> list[int]:
    """Turn "0,1,2" into [0, 1, 2].

    Raises:
        UserError: not a list of distinct whole numbers.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds: got {text!r}; allowed: distinct whole numbers from 0, such as 0,1,2")
    return seeds


def train_seeds(config: ExperimentConfig, arguments: argparse.Namespace) -> int:
    """Train every seed in RUN_FOLDER/seed_N, in sequence, and write seeds.json, seeds.md and seeds.html.

    Returns:
        The exit code: that of the first failed run, otherwise 0.

    Raises:
        UserError: wrong seeds, or a launch of several processes.
    """
    from frozen_fast.report.html import to_html
    from frozen_fast.report.markdown import to_markdown
    from frozen_fast.report.over_seeds import seed_folder, seeds_document, seeds_summary
    from frozen_fast.report.run_data import read_run

    seeds = parse_seeds(arguments.seeds)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds: got a launch of several processes; allowed: one (it starts a process for each seed)")
    folder = Path(config.run_folder.format(name=config.name))
    for seed in seeds:
        command = [sys.executable, "-m", "frozen_fast", "train", "--config", arguments.config]
        command += [*arguments.overrides, f"seed={seed}", f"run_folder={seed_folder(folder, seed)}"]
        code = subprocess.run([*command, "--resume", arguments.resume], check=False).returncode
        if code:
            return code
    runs = {seed: read_run(seed_folder(folder, seed)) for seed in seeds}
    document = seeds_document(config.name, runs, {"table": config.paper.table, "row": config.paper.row})
    write_json(folder / "seeds.json", seeds_summary(runs))
    write_atomically(folder / "seeds.md", to_markdown(document))
    write_atomically(folder / "seeds.html", to_html(document))
    print(to_markdown(document))
    return 0
