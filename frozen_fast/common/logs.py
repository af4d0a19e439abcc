"""Logging set-up: one line per message, rank 0 by default, without secrets."""

from __future__ import annotations

import logging
import sys

from frozen_fast.common.secrets import hide_secrets


class _Formatter(logging.Formatter):
    """Lines in which the environment's secrets are hidden."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, with its traceback if it has one."""
        return hide_secrets(super().format(record))


def set_up_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send this package's log to stderr; ranks above 0 log warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s"))
    for name in ("frozen_fast", "frozen_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level if rank == 0 else logging.WARNING)
        logger.propagate = False
