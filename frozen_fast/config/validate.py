"""Checks that a config has the sources for a task; schema.py checks its keys."""

from __future__ import annotations

from frozen_fast.config.schema import ExperimentConfig
from frozen_fast.errors import UserError


def check_for_training(config: ExperimentConfig) -> None:
    """Check that a config has training sources.

    Raises:
        UserError: if data.sources is empty, every weight is 0, or the weight of the source that ends an epoch is 0.
    """
    if not config.data.sources:
        raise UserError("data.sources: got none; allowed: one or more sources to train on")
    if not any(source.weight > 0 for source in config.data.sources):
        raise UserError("data.sources: got weight 0 for every source; allowed: at least one weight above 0")
    if config.data.epoch_ends == "first" and config.data.sources[0].weight == 0:
        raise UserError(
            "data.epoch_ends: got 'first' while data.sources[0] has weight 0 and is never read; "
            "allowed: a weight above 0 for it, or another end"
        )


def check_for_evaluation(config: ExperimentConfig) -> None:
    """Check that a config has evaluation sources.

    Raises:
        UserError: when evaluation.sources is empty.
    """
    if not config.evaluation.sources:
        raise UserError("evaluation.sources: got none; allowed: one or more sources to evaluate on")
