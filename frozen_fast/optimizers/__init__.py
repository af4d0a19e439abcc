"""Optimizers by name, their parameter groups, and the learning rate's schedule."""

from frozen_fast.optimizers.kinds import OptimizerKind, build_optimizer, optimizer_kind
from frozen_fast.optimizers.parameter_groups import freeze_groups, parameter_groups
from frozen_fast.optimizers.schedule import divergence_advice, learning_rate_factor, set_learning_rate
from frozen_fast.optimizers.weight_average import WEIGHT_AVERAGE

__all__ = [
    "WEIGHT_AVERAGE",
    "OptimizerKind",
    "build_optimizer",
    "divergence_advice",
    "freeze_groups",
    "learning_rate_factor",
    "optimizer_kind",
    "parameter_groups",
    "set_learning_rate",
]
