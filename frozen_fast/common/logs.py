"""Logging set-up: one line per message, rank 0 by default."""

from __future__ import annotations

import logging
import sys


def set_up_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send this package's log to stderr; ranks above 0 log warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s"))
    for name in ("frozen_fast", "frozen_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level if rank == 0 else logging.WARNING)
        logger.propagate = False
