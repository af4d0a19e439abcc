"""Retrieval: a contrastive loss over the clips and captions of all ranks, evaluated by ranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frozen_fast.config import ExperimentConfig
from frozen_fast.data import Source
from frozen_fast.evaluation.metric_table import directions
from frozen_fast.losses import RetrievalLoss, build_loss, gathered_loss
from frozen_fast.losses.gathered import anchors_loss
from frozen_fast.models.retrieval_model import Features, RetrievalModel
from frozen_fast.parallel.base import Parallel
from frozen_fast.training.evaluate import Evaluation, evaluate_with
from frozen_fast.training.signals import StopRequest
from frozen_fast.training.task import Task


@dataclass(frozen=True)
class RetrievalTask(Task):
    """Retrieval between captions and clips.

    Attributes:
        config: the experiment.
        retrieval_loss: what training minimises.
    """

    config: ExperimentConfig
    retrieval_loss: RetrievalLoss

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> RetrievalTask:
        """Build the loss that the config names."""
        return cls(config, build_loss(config.loss))

    def loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features
    ) -> tuple[Tensor, Tensor]:
        """losses.gathered_loss, with the clips and captions of all ranks as candidates."""
        settings = self.config.loss
        return gathered_loss(
            model.pair_similarities,
            self.retrieval_loss,
            text,
            video,
            parameters,
            local=settings.local,
            chunk_rows=settings.chunk_rows,
            gather_dtype=torch.bfloat16 if settings.gather == "bf16" else None,
        )

    def rehearsal_loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features, world_size: int
    ) -> Tensor:
        """Compute the loss with copies of this rank's features in place of the other ranks'."""
        settings = self.config.loss
        all_text, all_video = (
            {name: side.float().repeat(world_size, *[1] * (side.ndim - 1)) for name, side in sides.items()}
            for sides in (text, video)
        )
        clips = len(next(iter(video.values())))
        count = clips if settings.local else clips * world_size
        chunk = settings.chunk_rows or count
        with torch.autocast(next(iter(video.values())).device.type, enabled=False):
            return anchors_loss(
                model.pair_similarities, self.retrieval_loss, all_text, all_video, 0, count, chunk, parameters
            )

    def directions(self) -> dict[str, bool]:
        """Return the metrics of evaluation.metrics, and the validation loss."""
        return directions(self.config.evaluation.metrics)

    def evaluate(
        self,
        model: RetrievalModel,
        source: Source,
        parallel: Parallel,
        *,
        frames: int,
        loss_batch_size: int,
        gallery: bool,
        stop: StopRequest,
    ) -> Evaluation | None:
        """Rank the source's clips by its captions; see evaluate.evaluate_source."""
        return evaluate_with(
            self.config,
            model,
            source,
            parallel,
            frames=frames,
            loss_batch_size=loss_batch_size,
            gallery=gallery,
            stop=stop,
        )
