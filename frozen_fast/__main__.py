"""`python -m frozen_fast` does what the console script `frozen-fast` does."""

from frozen_fast.cli.main import console_script

console_script()
