"""The interface of losses: a sum over anchors, each compared with all candidates of the other modality.

An anchor is a caption compared with all clips, or a clip compared with all captions. A loss that is a sum over anchors
can be computed on each rank for the rank's own anchors, and in chunks of anchors.

Axis letters: K similarities of a pair, A anchors of one call, G candidates (the whole batch over all ranks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from frozen_fast.config import extensions
from frozen_fast.config.schema import LossConfig

Direction = Literal["t2v", "v2t"]


class RetrievalLoss(ABC):
    """A loss of a batch in which caption i belongs to clip i.

    Attributes:
        directions: the anchors: captions ("t2v"), clips ("v2t") or both.
    """

    directions: tuple[Direction, ...] = ("t2v", "v2t")

    @classmethod
    @abstractmethod
    def from_config(cls, config: LossConfig) -> RetrievalLoss:
        """Build the loss from the config's loss section.

        Raises:
            UserError: naming the key.
        """

    @abstractmethod
    def anchor_loss(self, sim_AG: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Compute the part of the loss of a batch of G pairs that comes from some anchors.

        Args:
            sim_AG: similarities of the anchors with all candidates, fp32 or fp64; the model's own, before any
                temperature.
            first: anchor i belongs to candidate first + i.
            parameters: parameters of the loss that the model learns (RetrievalModel.loss_parameters); usually empty.

        Returns:
            Scalar. The sum over all anchors of both directions is the loss of the batch.
        """


def build_loss(config: LossConfig) -> RetrievalLoss:
    """Build the loss that loss.name selects.

    Raises:
        UserError: an unknown name or a wrong setting.
    """
    loss: RetrievalLoss = extensions.losses.load(config.name).from_config(config)
    return loss
