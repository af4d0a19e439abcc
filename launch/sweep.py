"""Find the fastest settings for a machine by measurement: python launch/sweep.py configs/sweeps/NAME.yaml.

Each trial is an `accelerate launch` process of its own with limits on time and memory; out of memory, a crash,
a timeout and NaN are results. A second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from frozen_fast.common.logs import set_up_logging
from frozen_fast.errors import UserError
from frozen_fast.sweep.config import read_sweep
from frozen_fast.sweep.driver import Sweep

TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or resume a sweep; 0 with a winner, 1 where every trial failed, 2 for a mistake in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="sweep file (configs/sweeps/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the sweep file")
    parser.add_argument("--dry-run", action="store_true", help="print every trial's command and stop")
    options = parser.parse_args(arguments)
    set_up_logging()
    try:
        config = read_sweep(options.sweep, options.overrides)
        folder = Path(config.folder.format(name=config.name))
        sweep = Sweep(config, base=options.sweep.parent, folder=folder, train_script=TRAIN_SCRIPT)
        if options.dry_run:
            sweep.print_commands(sys.stdout)
            return 0
        return 0 if sweep.run() else 1
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
