"""Print how a run stands: running, done, stopped, failed, dead (killed without a word), or "unknown" since a time.

usage: python launch/run_state.py [--since UNIX_SECONDS] [--exit-code] EXPERIMENT.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import is_alive


def read_status(run_folder: Path, since: float, field: str) -> str:
    """A field of a run folder's status.json, "unknown" where there is none or it is older than `since`.

    A run that says "running" while no process holds its folder is "dead".
    """
    folder = RunFolder(run_folder)
    if not folder.status.exists() or folder.status.stat().st_mtime < since:
        return "unknown"
    status = folder.last_status()
    if field == "state" and status.get("state") == "running" and not is_alive(folder):
        return "dead"
    return "unknown" if status.get(field) is None else str(status[field])


def main() -> int:
    """Print the state; 2 for a mistake in the experiment file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", type=float, default=0.0, help="ignore what was written earlier, unix seconds")
    parser.add_argument("--exit-code", action="store_true", help="the run's own exit code instead of its state")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        config = load_config(options.experiment, options.overrides)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    field = "exit_code" if options.exit_code else "state"
    print(read_status(Path(config.run_folder.format(name=config.name)), options.since, field))
    return 0


if __name__ == "__main__":
    sys.exit(main())
