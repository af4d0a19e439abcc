"""Exponential moving average of the weights, stored in the optimizer's state.

It is therefore sharded, gathered, expanded with the frame embeddings and checkpointed like the optimizer's running
averages.
"""

from __future__ import annotations

from typing import Any

import torch

WEIGHT_AVERAGE = "weight_average"
"""Key of the average in the optimizer's state."""


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After every step, move the average of each trained parameter towards it: average += (1 - decay) * (w - average).

    Args:
        optimizer: changed in place.
        decay: share of the average that stays; above 0, below 1.
    """

    @torch.no_grad()
    def update(stepped: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        trained = [one for group in stepped.param_groups for one in group["params"] if stepped.state.get(one)]
        for parameter in trained:
            if WEIGHT_AVERAGE not in stepped.state[parameter]:
                stepped.state[parameter][WEIGHT_AVERAGE] = parameter.detach().clone()
        averages = [stepped.state[parameter][WEIGHT_AVERAGE] for parameter in trained]
        if averages:
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in trained], 1.0 - decay)

    optimizer.register_step_post_hook(update)
