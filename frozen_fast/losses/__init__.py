"""Losses of a batch of pairs, on one or several processes."""

from frozen_fast.losses.contrastive import InfoNCE, contrastive_loss, gathered_contrastive_loss
from frozen_fast.losses.gathered import batch_loss, gathered_loss
from frozen_fast.losses.max_margin import MaxMarginLoss
from frozen_fast.losses.retrieval_loss import RetrievalLoss, build_loss
from frozen_fast.losses.sigmoid import SigmoidLoss

__all__ = [
    "InfoNCE",
    "MaxMarginLoss",
    "RetrievalLoss",
    "SigmoidLoss",
    "batch_loss",
    "build_loss",
    "contrastive_loss",
    "gathered_contrastive_loss",
    "gathered_loss",
]
