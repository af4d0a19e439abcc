"""AdamW over named groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.errors import UserError

_POSITIONS = ("cls_token", "pos_embed", "temporal_embed", "position_embeddings", "token_type_embeddings")
_VIDEO_POSITIONS = ("video_model.cls_token", "video_model.pos_embed", "video_model.temporal_embed")
_TEXT_TOWER = "text_model."


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases and norms (one axis) nor to embeddings of position."""
    return parameter.ndim > 1 and not any(part in name for part in _POSITIONS)


def learning_rate_scale(name: str, config: OptimizerConfig) -> float:
    """The factor on the learning rate of a parameter, by its name in DualEncoder."""
    if name.startswith(_TEXT_TOWER):
        return config.text_learning_rate_scale
    return config.position_learning_rate_scale if name in _VIDEO_POSITIONS else 1.0


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split trainable parameters by weight decay and by factor on the learning rate.

    Returns:
        Groups for torch.optim.AdamW; "scale" is each group's factor on the learning rate.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            scale = learning_rate_scale(name, config)
            decay = config.weight_decay if decays(name, parameter) else 0.0
            members.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay, "lr": config.learning_rate * scale}
        for (scale, decay), parameters in members.items()
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW for a model that is already on its device.

    optimizer.fused: "auto" takes the fused kernel where PyTorch has one for the parameters' device.

    Raises:
        UserError: fused was asked for where there is none.
    """
    device = next(model.parameters()).device.type
    supported = device in ("cuda", "cpu")
    if config.fused == "on" and not supported:
        raise UserError(f"optimizer.fused: got 'on', but there is no fused AdamW on {device}; allowed: auto, off")
    fused = config.fused != "off" and supported
    groups = parameter_groups(model.named_parameters(), config)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The schedule's factor at an optimizer step.

    Args:
        step: optimizer step of the whole run, from 1.
        total_steps: steps of the whole run.
        config: warmup_steps of linear warm-up, then constant, or a cosine that would reach 0 one step after the last.

    Returns:
        A factor in (0, 1].
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
    """Give every parameter group its scaled learning rate."""
    for group in groups:
        group["lr"] = learning_rate * group["scale"]


def divergence_advice(config: OptimizerConfig) -> str:
    """Which keys to change when a loss or a weight is not finite."""
    return (
        f"lower optimizer.learning_rate ({config.learning_rate:g}), lengthen optimizer.warmup_steps "
        f"({config.warmup_steps}) or set optimizer.gradient_clip_norm ({config.gradient_clip_norm:g})"
    )
