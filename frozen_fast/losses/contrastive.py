"""Symmetric InfoNCE: the plain form for one batch, and the form as a sum over anchors for several ranks.

Axis letters: B clips of this rank, D width of the common space, A anchors, G candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.common.autocast import without_autocast
from frozen_fast.common.similarity import cosine_similarities
from frozen_fast.config.schema import LossConfig
from frozen_fast.errors import UserError
from frozen_fast.losses.gathered import Features, gathered_loss
from frozen_fast.losses.retrieval_loss import RetrievalLoss


def contrastive_loss(video_BD: Tensor, text_BD: Tensor, temperature: float = 0.05) -> Tensor:
    """Symmetric InfoNCE of a batch; row i of video_BD matches row i of text_BD.

    Args:
        video_BD: video embeddings [B, D], any floating type; normalised inside.
        text_BD: text embeddings [B, D]; normalised inside.
        temperature: divides the cosine similarities; above 0.

    Returns:
        Scalar: mean cross-entropy of video-to-text plus that of text-to-video (a sum, Frozen in Time equations 1-2),
        computed in fp32 (fp64 for fp64 input), also under autocast.

    Raises:
        UserError: the shapes differ, the batch is empty, or the temperature is not above 0.
    """
    _check_pairs(video_BD, text_BD)
    _check_temperature(temperature)
    with without_autocast(video_BD.device.type):
        logits_BB = cosine_similarities(video_BD, text_BD) / temperature
        own_B = torch.arange(len(logits_BB), device=logits_BB.device)
        return F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)


def gathered_contrastive_loss(
    video_BD: Tensor,
    text_BD: Tensor,
    temperature: float = 0.05,
    *,
    local: bool = True,
    chunk_rows: int = 0,
    gather_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """contrastive_loss with the clips of all ranks as negatives; the options are those of gathered_loss.

    Returns:
        (loss to backpropagate on this rank, value of the whole batch's loss, detached and equal on all ranks).

    Raises:
        UserError: as contrastive_loss and gathered_loss.
    """
    _check_pairs(video_BD, text_BD)

    def compare(text: Features, video: Features) -> Tensor:
        return cosine_similarities(text["embedding"], video["embedding"])[None]

    text, video = {"embedding": text_BD}, {"embedding": video_BD}
    return gathered_loss(
        compare, InfoNCE(temperature), text, video, local=local, chunk_rows=chunk_rows, gather_dtype=gather_dtype
    )


class InfoNCE(RetrievalLoss):
    """Cross-entropy of the true pair among all candidates, both sides as anchors (equations 1-2 of the paper)."""

    def __init__(self, temperature: float = 0.05, *, average_directions: bool = False) -> None:
        """Initialise the loss.

        Args:
            temperature: divides the similarities if the model has no learned logit_scale; above 0.
            average_directions: use the mean of both directions (CLIP) instead of their sum (the paper).
        """
        _check_temperature(temperature)
        self.temperature = temperature
        self.factor = 0.5 if average_directions else 1.0

    @classmethod
    def from_config(cls, config: LossConfig) -> InfoNCE:
        """loss.temperature and loss.average_directions."""
        return cls(config.temperature, average_directions=config.average_directions)

    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """See RetrievalLoss."""
        if "logit_scale" in parameters:
            logits_AG = sim_AG * parameters["logit_scale"].to(sim_AG.dtype).exp()
        else:
            logits_AG = sim_AG / self.temperature
        own_A = torch.arange(first, first + len(sim_AG), device=sim_AG.device)
        return F.cross_entropy(logits_AG, own_A, reduction="sum") * (self.factor / sim_AG.shape[1])


def _check_pairs(video_BD: Tensor, text_BD: Tensor) -> None:
    if video_BD.ndim != 2 or video_BD.shape != text_BD.shape or not len(video_BD):
        got = f"{list(video_BD.shape)} and {list(text_BD.shape)}"
        raise UserError(f"loss: got video and text embeddings of shapes {got}; allowed: the same [B, D] with B >= 1")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"loss.temperature: got {temperature}; allowed: above 0")
