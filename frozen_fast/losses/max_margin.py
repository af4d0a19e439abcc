"""Collaborative Experts' bidirectional max-margin ranking loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frozen_fast.config.schema import LossConfig
from frozen_fast.losses.retrieval_loss import RetrievalLoss


class MaxMarginLoss(RetrievalLoss):
    """Mean over both directions and all i != j of relu(margin - sim_ii + sim_ij) and relu(margin - sim_ii + sim_ji)."""

    def __init__(self, margin: float) -> None:
        """Initialise with the margin between the similarities of matching and other pairs."""
        self.margin = margin

    @classmethod
    def from_config(cls, config: LossConfig) -> MaxMarginLoss:
        """loss.margin."""
        return cls(config.margin)

    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """See RetrievalLoss; the loss of a batch of one pair is 0."""
        anchors, candidates = sim_AG.shape
        own_A1 = torch.arange(first, first + anchors, device=sim_AG.device)[:, None]
        violation_AG = (self.margin - sim_AG.gather(1, own_A1) + sim_AG).relu()
        violation_AG = violation_AG.scatter(1, own_A1, 0.0)
        return violation_AG.sum() / max(1, 2 * candidates * (candidates - 1))
