"""Find the fastest settings for a machine by measurement: python launch/sweep.py configs/sweeps/NAME.yaml.

Each trial is an `accelerate launch` process of its own with limits on time and memory; out of memory, a crash,
a timeout and NaN are results. A second call continues a stopped sweep.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
if find_spec("frozen_fast") is None:  # a checkout that is not installed
    sys.path.append(str(ROOT))

from frozen_fast.common.logs import set_up_logging  # noqa: E402
from frozen_fast.errors import UserError  # noqa: E402
from frozen_fast.sweep.driver import Sweep  # noqa: E402
from frozen_fast.sweep.outcome import Cause  # noqa: E402
from frozen_fast.sweep.sweep_file import read_sweep  # noqa: E402

EXIT_STOPPED = 75
FAILURES = [cause for cause in get_args(Cause) if cause != "ok"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or resume a sweep.

    Returns:
        0 with a winner, 1 where every trial failed, 2 for a mistake in the file, 75 when SIGTERM or SIGINT stopped it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="sweep file (configs/sweeps/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the sweep file")
    parser.add_argument("--dry-run", action="store_true", help="print every trial's command and exit")
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        choices=FAILURES,
        metavar="CAUSE",
        help=f"repeat trials with these failures: {', '.join(FAILURES)}",
    )
    options = parser.parse_args(arguments)
    set_up_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = read_sweep(options.sweep, options.overrides)
        folder = Path(config.folder.format(name=config.name))
        sweep = Sweep(config, folder=folder, train_script=ROOT / "train.py", again=options.again)
        if options.dry_run:
            sweep.print_commands(sys.stdout)
            return 0
        winner = sweep.run()
        print((folder / "ranking.md").read_text(encoding="utf-8"))
        return 0 if winner else 1
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to continue\n")
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
