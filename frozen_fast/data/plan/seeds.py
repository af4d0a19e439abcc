"""Random generators keyed by what they draw, independent of rank, worker and order."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_MASK = 2**64 - 1


def keyed_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """A generator that is a pure function of the run's seed and some keys, such as a source's name and a position."""
    numbers = [key & _MASK if isinstance(key, int) else _hashed(key) for key in keys]
    return np.random.default_rng([seed & _MASK, *numbers])


@lru_cache(maxsize=1024)
def _hashed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
