"""SigLIP's pairwise sigmoid loss (Zhai et al. 2023, equation 1): a binary classification of every pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.config.schema import LossConfig
from frozen_fast.losses.retrieval_loss import RetrievalLoss


class SigmoidLoss(RetrievalLoss):
    """-1/G * sum over captions i and clips j of log sigmoid(z_ij * (scale * sim_ij + bias)), z_ii = 1, else -1."""

    directions = ("t2v",)  # a pair counts once

    def __init__(self, scale: float, bias: float) -> None:
        """Initialise with the values for models that do not learn them.

        Args:
            scale: factor on the similarities, replaced by exp(logit_scale) if that is learned.
            bias: added to the scaled similarities, replaced by logit_bias if that is learned.
        """
        self.scale = scale
        self.bias = bias

    @classmethod
    def from_config(cls, config: LossConfig) -> SigmoidLoss:
        """1 / loss.temperature and loss.sigmoid_bias, both learned with loss.learnable_temperature."""
        return cls(1.0 / config.temperature, config.sigmoid_bias)

    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """See RetrievalLoss."""
        scale = parameters["logit_scale"].to(sim_AG.dtype).exp() if "logit_scale" in parameters else self.scale
        bias = parameters["logit_bias"].to(sim_AG.dtype) if "logit_bias" in parameters else self.bias
        logits_AG = sim_AG * scale + bias
        own_A1 = torch.arange(first, first + len(sim_AG), device=sim_AG.device)[:, None]
        sign_AG = torch.full_like(logits_AG, -1.0).scatter_(1, own_A1, 1.0)
        return -F.logsigmoid(sign_AG * logits_AG).sum() / sim_AG.shape[1]
