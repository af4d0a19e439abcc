"""Faults that tests put into a run: numbers that are not finite, a device without memory, a slow rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from frozen_fast.data import Batch
from frozen_fast.models import DualEncoder
from frozen_fast.training import optimizer_step

Fault = Callable[..., None]
"""Takes the keys of inject's fault as arguments."""


def replacing_faults(patch: pytest.MonkeyPatch) -> Fault:
    """Puts a fault in the place of the one before."""

    def put(**what: Any) -> None:
        patch.undo()
        inject(patch, what)

    return put


def inject(patch: pytest.MonkeyPatch, fault: dict[str, Any]) -> None:
    """Break this process.

    Args:
        patch: undoes it.
        fault: {"rank": which one, None or missing: all, and one of
            "nan_at": steps in which the features of one clip are NaN, "seed": of the clips' order (any without it);
            "most_clips": of a forward pass with gradients, beyond which the device is out of memory;
            "slow_seconds": what each forward pass takes longer}.
    """
    if fault.get("rank") not in (None, int(os.environ.get("RANK", "0"))):
        return
    features, one_pass = DualEncoder.video_features, optimizer_step.forward_backward
    spoiled = False

    def watched_pass(*arguments: Any, batch: Batch, **options: Any) -> torch.Tensor:
        nonlocal spoiled
        spoiled = batch.spec.step in fault.get("nan_at", ()) and fault.get("seed") in (None, batch.spec.seed)
        return one_pass(*arguments, batch=batch, **options)

    def faulty_features(self: DualEncoder, video: Any) -> Any:
        if torch.is_grad_enabled() and len(video) > fault.get("most_clips", len(video)):
            raise torch.OutOfMemoryError(f"{len(video)} clips")
        time.sleep(fault.get("slow_seconds", 0.0))
        found = features(self, video)
        if not spoiled:
            return found
        factor_B = torch.ones(len(video))
        factor_B[0] = float("nan")
        return {name: side * factor_B[:, None] for name, side in found.items()}

    patch.setattr(optimizer_step, "forward_backward", watched_pass)
    patch.setattr(DualEncoder, "video_features", faulty_features)
