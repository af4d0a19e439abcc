"""Autocast on any device, meta included, where FLOPs are counted and which has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Computing in the tensors' own dtypes."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast; None where it is disabled."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
