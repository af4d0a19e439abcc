"""Ranger: RAdam with Lookahead.

Sources: Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond"; Zhang et al. 2019, "Lookahead
Optimizer". The released expert models are trained with it, at betas (0.95, 0.999) and epsilon 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frozen_fast.optimizers.rectified_adam import RectifiedAdam

LOOKAHEAD_SHARE = 0.5
LOOKAHEAD_STEPS = 6


class Ranger(RectifiedAdam):
    """RAdam with decoupled weight decay and Lookahead; the slow weights start as a copy of the weights."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of RAdam; every sixth step moves the slow weights halfway to the weights and copies them back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        first: dict[Tensor, Tensor] = {one: one.detach().clone() for one in trained if not self.state[one]}
        self.update_parameters()
        for one in trained:
            state = self.state[one]
            if one in first:
                state["slow_buffer"] = first[one]
            if int(state["step"]) % LOOKAHEAD_STEPS == 0:
                one.copy_(state["slow_buffer"].lerp_(one, LOOKAHEAD_SHARE))
        return loss
