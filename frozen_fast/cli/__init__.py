"""The command line: `frozen-fast`, `python -m frozen_fast` and train.py; heavy imports are deferred."""

from frozen_fast.cli.main import console_script, main, run_and_report

__all__ = ["console_script", "main", "run_and_report"]
