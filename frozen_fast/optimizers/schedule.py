"""Learning rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from frozen_fast.config.schema import OptimizerConfig


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig, epoch_steps: float = math.inf) -> float:
    """The schedule's factor at an optimizer step.

    Args:
        step: optimizer step of the whole run, from 1.
        total_steps: steps of the whole run.
        config: warmup_steps of linear warm-up, then constant, a cosine that would reach 0 one step after the last, or a
            factor per epoch.
        epoch_steps: optimizer steps of an epoch.

    Returns:
        A factor in (0, 1].
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "epoch_decay":
        return float(config.epoch_factor ** int((step - 1) / epoch_steps))
    done = (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
    """Set the scaled learning rate of every parameter group."""
    for group in groups:
        group["lr"] = learning_rate * group["scale"]


def divergence_advice(config: OptimizerConfig) -> str:
    """Advice on config keys if a loss or a weight is not finite."""
    return (
        f"lower optimizer.learning_rate ({config.learning_rate:g}), lengthen optimizer.warmup_steps "
        f"({config.warmup_steps}) or set optimizer.gradient_clip_norm ({config.gradient_clip_norm:g})"
    )
