"""Parameter groups from name patterns: learning rate, weight decay and freezing per part of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from frozen_fast.config.schema import OptimizerConfig, OptimizerGroupConfig
from frozen_fast.errors import UserError

log = logging.getLogger(__name__)

OLDER_KEYS = {
    "text_learning_rate_scale": ("text_model.*",),
    "position_learning_rate_scale": ("video_model.cls_token", "video_model.pos_embed", "video_model.temporal_embed"),
}
"""Deprecated keys for whole towers, and the equivalent patterns of optimizer.groups."""

_POSITIONS = ("cls_token", "pos_embed", "temporal_embed", "position_embeddings", "token_type_embeddings")


@dataclass(frozen=True)
class ParameterSettings:
    """Settings of one parameter."""

    learning_rate_scale: float
    weight_decay: float
    frozen: bool


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies by default: not to biases, norms (one axis) and position embeddings."""
    return parameter.ndim > 1 and not any(part in name for part in _POSITIONS)


def groups_in_order(config: OptimizerConfig) -> list[OptimizerGroupConfig]:
    """The groups of the two deprecated keys, then optimizer.groups."""
    older = [
        OptimizerGroupConfig(match=match, learning_rate_scale=getattr(config, key))
        for key, matches in OLDER_KEYS.items()
        for match in matches
        if getattr(config, key) != 1.0
    ]
    return [*older, *config.groups]


def settings_by_name(
    named: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> dict[str, ParameterSettings]:
    """The settings of every parameter; the last matching pattern with a value decides.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    groups = groups_in_order(config)
    names = [name for name, _ in named]
    for group in groups:
        if not any(fnmatchcase(name, group.match) for name in names):
            near = get_close_matches(group.match, names, n=1, cutoff=0.0)
            raise UserError(
                f"optimizer.groups: got match {group.match!r}, which no parameter has; allowed: names and patterns "
                f"with * such as {near[0] if near else 'text_model.*'}"
            )
    found = {}
    for name, parameter in named:
        decaying = config.decay_all or decays(name, parameter)
        scale, decay, frozen = 1.0, config.weight_decay if decaying else 0.0, False
        for group in groups:
            if fnmatchcase(name, group.match):
                scale = scale if group.learning_rate_scale is None else group.learning_rate_scale
                decay = decay if group.weight_decay is None else group.weight_decay
                frozen = frozen if group.frozen is None else group.frozen
        found[name] = ParameterSettings(scale, decay, frozen)
    return found


def freeze_groups(model: nn.Module, config: OptimizerConfig) -> None:
    """Freeze the parameters that optimizer.groups freezes, before a strategy wraps the model; warns of older keys.

    Raises:
        UserError: every parameter is frozen, or a pattern matches nothing.
    """
    for key, matches in OLDER_KEYS.items():
        scale = getattr(config, key)
        if scale != 1.0:
            groups = ", ".join(f"{{match: {match}, learning_rate_scale: {scale:g}}}" for match in matches)
            log.warning("optimizer.%s is deprecated; use optimizer.groups: [%s]", key, groups)
    named = list(model.named_parameters())
    for name, settings in settings_by_name(named, config).items():
        if settings.frozen:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise UserError("optimizer.groups: got every parameter frozen; allowed: at least one that trains")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split trainable parameters by weight decay and by factor on the learning rate.

    Returns:
        Groups for a torch optimizer; "scale" is each group's factor on the learning rate.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    listed = list(named)
    settings = settings_by_name(listed, config)
    for name, parameter in listed:
        if parameter.requires_grad:
            key = (settings[name].learning_rate_scale, settings[name].weight_decay)
            members.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay, "lr": config.learning_rate * scale}
        for (scale, decay), parameters in members.items()
    ]
