"""Rectified Adam, computed by Adam's kernels: one pass over the weights on a CPU.

Source: Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond". Once the variance can be rectified
(with a second beta of 0.999, from the sixth step), an update is AdamW's with another learning rate, weight decay and
epsilon, so that AdamW's fused kernel makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

SHORTEST_MEMORY = 5.0
"""Below this length of the running average of squares, a step is not scaled by it."""


def rectification(step: int, second_beta: float) -> float | None:
    """The factor r_t of the paper; None where the variance of the running average of squares is not tractable yet."""
    longest = 2 / (1 - second_beta) - 1
    length = longest - 2 * step * second_beta**step / (1 - second_beta**step)
    if length <= SHORTEST_MEMORY:
        return None
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(ratio)


class RectifiedAdam(torch.optim.AdamW):
    """RAdam with decoupled weight decay; keeps the state that torch.optim.RAdam keeps."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_parameters()
        return loss

    def update_parameters(self) -> None:
        """Update the parameters group by group; those of one group that have seen another number of steps apart."""
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            parameters, gradients, means, squares, _, steps = lists
            ages = [int(step) for step in steps]
            for age in sorted(set(ages)):
                chosen = [place for place, own in enumerate(ages) if own == age]
                parts = [
                    [tensors[place] for place in chosen] for tensors in (parameters, gradients, means, squares, steps)
                ]
                _update(group, age + 1, *parts)


def _update(
    group: dict[str, Any],
    step: int,
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Update parameters that are at the same step."""
    first, second = group["betas"]
    rate, decay = group["lr"], group["weight_decay"]
    factor = rectification(step, second)
    if factor is not None:
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=group["fused"] or None,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=rate * factor,
            weight_decay=decay / factor,
            eps=group["eps"] / math.sqrt(1 - second**step),
            maximize=False,
        )
        return
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(means, gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
    torch._foreach_mul_(parameters, 1 - rate * decay)
    torch._foreach_add_(parameters, means, alpha=-rate / (1 - first**step))
