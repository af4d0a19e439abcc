"""`frozen-fast average-checkpoints`: the mean of several checkpoints' weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from frozen_fast.errors import UserError


def average_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `average-checkpoints`."""
    parser.add_argument("checkpoints", nargs="+", metavar="PATH", help="checkpoint folders, or one run folder")
    parser.add_argument("--last", type=int, metavar="K", help="with a run folder: its newest K checkpoints")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the averaged model")


def average(arguments: argparse.Namespace) -> int:
    """Average checkpoints into a folder that every command takes as a checkpoint."""
    from frozen_fast.models.average_checkpoints import average_checkpoints, newest_checkpoints

    paths = [Path(path).expanduser() for path in arguments.checkpoints]
    is_run = len(paths) == 1 and (paths[0] / "checkpoints").is_dir()
    if is_run != (arguments.last is not None):
        got = "got it without a run folder" if arguments.last is not None else "got none for a run folder"
        raise UserError(f"--last: {got}; allowed: RUN --last K, or several checkpoint folders")
    if is_run:
        if arguments.last < 2:
            raise UserError(f"--last: got {arguments.last}; allowed: 2 or more")
        paths = newest_checkpoints(paths[0], arguments.last)
    average_checkpoints(paths, Path(arguments.output))
    print(arguments.output)
    return 0
