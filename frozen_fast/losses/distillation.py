"""Distillation of the teachers' similarities (Croitoru et al. 2021, TeachText).

Axis letters: A captions of one call, G captions and clips of the batch over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from frozen_fast.config.schema import LossConfig
from frozen_fast.losses.retrieval_loss import Direction, RetrievalLoss

TEACHERS = "teachers"


class SimilarityDistillation(RetrievalLoss):
    """Smooth L1 between the student's and the teachers' similarities, the mean over all pairs of the batch."""

    directions: tuple[Direction, ...] = ("t2v",)

    def __init__(self, beta: float = 1.0) -> None:
        """Initialise with beta, the difference at which the loss changes from quadratic to linear."""
        self.beta = beta

    @classmethod
    def from_config(cls, config: LossConfig) -> SimilarityDistillation:
        """Use beta 1, as in the released code; the config has no key for it."""
        return cls()

    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """See RetrievalLoss; parameters["teachers"] is the teachers' mean similarity [G, G]."""
        target_AG = parameters[TEACHERS][first : first + len(sim_AG)]
        total = F.smooth_l1_loss(sim_AG, target_AG, beta=self.beta, reduction="sum")
        return total / target_AG.shape[1] ** 2
