"""Print the state of a run: running, done, stopped, failed, dead (its process was killed), or unknown.

usage: python launch/run_state.py [--since UNIX_SECONDS] [--exit-code | --message] EXPERIMENT.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from frozen_fast.common.files import write_json
from frozen_fast.config import load_config
from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import is_alive


def read_status(run_folder: Path, since: float, field: str) -> str:
    """A field of a run folder's status.json, "unknown" if there is none or it is older than `since`.

    The state is "dead" if status.json says "running" but no process holds the lock of the folder.
    """
    folder = RunFolder(run_folder)
    if not folder.status.exists() or folder.status.stat().st_mtime < since:
        return "unknown"
    status = folder.last_status()
    if field == "state" and status.get("state") == "running" and not is_alive(folder):
        return "dead"
    return "unknown" if status.get(field) is None else str(status[field])


def may_restart(run_folder: Path, futile_starts: int) -> tuple[bool, str]:
    """Whether a run that ended without finishing should be restarted.

    Each call counts as one start: restarts.json in the run folder holds the step of the last checkpoint and the number
    of consecutive starts that saved none.

    Returns:
        (the answer, one line with the reason).
    """
    folder = RunFolder(run_folder)
    status = folder.last_status()
    if not status:
        return False, "the run failed before it wrote status.json"
    if status.get("state") in ("done", "stopped") or status.get("exit_code") == 2:
        return False, f"the run is {status.get('state')} with exit code {status.get('exit_code')}"
    path = run_folder / "restarts.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        futile, before = int(known["futile_starts"]), known["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        futile, before = 0, None
    checkpoint = status.get("checkpoint")
    futile = 0 if checkpoint is not None and checkpoint != before else futile + 1
    write_json(path, {"checkpoint": checkpoint, "futile_starts": futile})
    if futile >= futile_starts:
        return False, f"not restarting: {futile} starts in a row saved no checkpoint (the last is {checkpoint})"
    return True, f"restarting from checkpoint {checkpoint}"


def main() -> int:
    """Print the state; returns 2 for a mistake in the experiment file, 1 if --restart refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", type=float, default=0.0, help="ignore a status.json older than this (Unix seconds)")
    parser.add_argument("--exit-code", action="store_true", help="print the exit code of the run instead of its state")
    parser.add_argument("--message", action="store_true", help="print the error of a failed run instead of its state")
    parser.add_argument("--restart", action="store_true", help="exit with 0 if a failed run should be restarted")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        config = load_config(options.experiment, options.overrides)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    run_folder = Path(config.run_folder.format(name=config.name))
    if options.restart:
        restart, why = may_restart(run_folder, int(os.environ.get("FROZEN_FAST_FUTILE_STARTS", "3")))
        print(why)
        return 0 if restart else 1
    if options.message:
        message = read_status(run_folder, options.since, "message")
        if message != "unknown":
            print("\n".join(f"error: {line}" for line in message.splitlines()))
        return 0
    field = "exit_code" if options.exit_code else "state"
    print(read_status(run_folder, options.since, field))
    return 0


if __name__ == "__main__":
    sys.exit(main())
