"""Random generators that depend on what is drawn, and on nothing else: not on rank, worker or order."""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = 2**64 - 1


def keyed_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """A generator that is a pure function of the run's seed and some keys, such as a source's name and a position."""
    return np.random.default_rng([seed & _MASK, *(_as_int(key) & _MASK for key in keys)])


def _as_int(key: int | str) -> int:
    if isinstance(key, int):
        return key
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
