"""Losses: symmetric InfoNCE, on one process or gathered over ranks."""

from frozen_fast.losses.contrastive import contrastive_loss, gathered_contrastive_loss

__all__ = ["contrastive_loss", "gathered_contrastive_loss"]
