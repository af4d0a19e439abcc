"""Typed experiment configs: strict YAML in, frozen dataclasses out, and the curriculum's arithmetic. No torch."""

from frozen_fast.config.curriculum import (
    StagePlan,
    loss_batch_size,
    resolve_stages,
    source_name,
    step_fractions,
    steps_per_epoch,
)
from frozen_fast.config.dump import docs_markdown, dump_yaml, help_text
from frozen_fast.config.fields import to_plain
from frozen_fast.config.load import config_from_mapping, load_config
from frozen_fast.config.schema import ExperimentConfig
from frozen_fast.config.validate import check_for_evaluation, check_for_training

__all__ = [
    "ExperimentConfig",
    "StagePlan",
    "check_for_evaluation",
    "check_for_training",
    "config_from_mapping",
    "docs_markdown",
    "dump_yaml",
    "help_text",
    "load_config",
    "loss_batch_size",
    "resolve_stages",
    "source_name",
    "step_fractions",
    "steps_per_epoch",
    "to_plain",
]
