"""The optimizers of optimizer.name, from torch and timm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from frozen_fast.config import extensions
from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.errors import UserError
from frozen_fast.optimizers.parameter_groups import parameter_groups
from frozen_fast.optimizers.ranger import Ranger
from frozen_fast.optimizers.rectified_adam import RectifiedAdam
from frozen_fast.optimizers.weight_average import WEIGHT_AVERAGE, keep_average

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """An optimizer and its properties.

    Attributes:
        build: (parameter groups, config, whether to use a fused kernel) -> optimizer.
        state_keys: the tensors of a parameter's shape that it keeps per parameter.
        weight_copies: the state tensors that are initialised with the weights; the others start at 0.
        elementwise: whether the update of an element depends on that element only, as required for sharded parameters
            (ZeRO, FSDP2).
        fused_on: the devices on which it has a fused kernel.
        step_in_group: it counts its steps per group, not per parameter.
    """

    build: Callable[[Groups, OptimizerConfig, bool], torch.optim.Optimizer]
    state_keys: tuple[str, ...]
    weight_copies: tuple[str, ...] = ()
    elementwise: bool = True
    fused_on: tuple[str, ...] = ()
    step_in_group: bool = False


def _adamw(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def _adam(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def _radam(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return RectifiedAdam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def _ranger(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return Ranger(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def _lion(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    from timm.optim import Lion

    return Lion(groups, lr=config.learning_rate, betas=config.betas)


def _lamb(groups: Groups, config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    from timm.optim import Lamb

    # Clipping is optimizer.gradient_clip_norm, for every optimizer alike.
    return Lamb(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, max_grad_norm=None)


ADAMW = OptimizerKind(build=_adamw, state_keys=("exp_avg", "exp_avg_sq"), fused_on=("cuda", "cpu"))
ADAM = OptimizerKind(build=_adam, state_keys=("exp_avg", "exp_avg_sq"), fused_on=("cuda", "cpu"))
# On CUDA the fused kernel counts steps on the device, and the rectification reads them: a GPU would be waited for.
RADAM = OptimizerKind(build=_radam, state_keys=("exp_avg", "exp_avg_sq"), fused_on=("cpu",))
RANGER = OptimizerKind(
    build=_ranger,
    state_keys=("exp_avg", "exp_avg_sq", "slow_buffer"),
    weight_copies=("slow_buffer",),
    fused_on=("cpu",),
)
LION = OptimizerKind(build=_lion, state_keys=("exp_avg",))
LAMB = OptimizerKind(build=_lamb, state_keys=("exp_avg", "exp_avg_sq"), elementwise=False, step_in_group=True)


def optimizer_kind(config: OptimizerConfig) -> OptimizerKind:
    """The kind that optimizer.name selects, with weight averaging if the config sets it.

    Raises:
        UserError: an unknown name.
    """
    kind: OptimizerKind = extensions.optimizers.load(config.name)
    if not config.weight_average_decay:
        return kind
    keys, copies = (*kind.state_keys, WEIGHT_AVERAGE), (*kind.weight_copies, WEIGHT_AVERAGE)
    return replace(kind, state_keys=keys, weight_copies=copies)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a model that is already on its device; skips parameters that are not trained.

    optimizer.fused: "auto" uses the fused kernel if PyTorch has one for the optimizer and the device.

    Raises:
        UserError: fused is "on" without a fused kernel, or a name or group is invalid.
    """
    kind = optimizer_kind(config)
    device = next(model.parameters()).device.type
    supported = device in kind.fused_on
    if config.fused == "on" and not supported:
        raise UserError(
            f"optimizer.fused: got 'on', but {config.name} has no fused kernel on {device}; allowed: auto, off"
        )
    groups = parameter_groups(model.named_parameters(), config)
    optimizer = kind.build(groups, config, config.fused != "off" and supported)
    if config.weight_average_decay:
        keep_average(optimizer, config.weight_average_decay)
    return optimizer
