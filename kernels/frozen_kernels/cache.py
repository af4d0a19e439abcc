"""The cache folder for measured choices and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """FROZEN_FAST_CACHE, or frozen_fast in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("FROZEN_FAST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frozen_fast"


def leads_outside(path: Path) -> bool:
    """Return whether a symbolic link leads a path out of cache_folder(); nothing is written to such paths."""
    return not path.resolve().is_relative_to(cache_folder().resolve())
