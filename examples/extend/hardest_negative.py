"""A loss from outside the tree: the margin to the hardest negative alone (VSE++, Faghri et al. 2018, equation 6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import Self

from frozen_fast.config.schema import LossConfig
from frozen_fast.losses import RetrievalLoss


class HardestNegative(RetrievalLoss):
    """Mean over captions and clips of relu(margin - sim_ii + max over j != i of sim_ij)."""

    def __init__(self, margin: float) -> None:
        """Hold the margin."""
        self.margin = margin

    @classmethod
    def from_config(cls, config: LossConfig) -> Self:
        """loss.margin."""
        return cls(config.margin)

    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """See RetrievalLoss."""
        own_A1 = torch.arange(first, first + len(sim_AG), device=sim_AG.device)[:, None]
        hardest_A1 = sim_AG.scatter(1, own_A1, -torch.inf).amax(1, keepdim=True)
        return (self.margin - sim_AG.gather(1, own_A1) + hardest_A1).relu().sum() / sim_AG.shape[1]
