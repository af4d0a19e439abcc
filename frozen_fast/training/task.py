"""The interface of a training task: its loss, its evaluation, and the metrics for the best checkpoint.

The engine, the checkpoints, the report and the meters are the same for every task. A model's class names its task
(RetrievalModel.task), and frozen_fast.config.extensions.tasks holds the code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from frozen_fast.config import ExperimentConfig, extensions
from frozen_fast.data import Source
from frozen_fast.models.retrieval_model import Features, RetrievalModel, VideoInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.training.evaluate import Evaluation
from frozen_fast.training.signals import StopRequest


class Task(ABC):
    """A training task.

    Attributes:
        has_negatives: whether a clip's loss depends on the other clips of its pass.
    """

    has_negatives = True

    @classmethod
    @abstractmethod
    def from_config(cls, config: ExperimentConfig) -> Task:
        """Build the task.

        Raises:
            UserError: naming the key.
        """

    def training_sources(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        """Return the training sources for the loader."""
        return dict(sources)

    def inputs(self, video: VideoInput, text: Mapping[str, Tensor]) -> tuple[VideoInput, Mapping[str, Tensor]]:
        """Return the model's input for a training batch; random numbers come from torch's global generator."""
        return video, text

    @abstractmethod
    def loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch over all ranks; every rank calls this.

        Args:
            model: compares features. It must not read parameters here, because sharding strategies gather them in
                forward() only.
            text: features of this rank's texts.
            video: features of this rank's clips.
            parameters: RetrievalModel.loss_parameters.

        Returns:
            (loss to backpropagate on this rank, whose gradient averaged over ranks is that of one process with the
            whole batch; the value of the whole batch's loss, detached and equal on all ranks).
        """

    @abstractmethod
    def rehearsal_loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features, world_size: int
    ) -> Tensor:
        """Compute a loss of this rank's features alone, without communication, that needs the memory of loss()."""

    @abstractmethod
    def directions(self) -> dict[str, bool]:
        """Return every metric that evaluation.keep_best may name -> whether higher is better."""

    @abstractmethod
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
        """Evaluate on one source; every rank calls this.

        Args:
            model: on its device, with whole weights.
            source: the clips.
            parallel: ranks and autocast.
            frames: frames per window if evaluation.frames is null; images have one. If the model has learned fewer
                frames than evaluation.frames so far, it gets as many as it has learned.
            loss_batch_size: batch size of a validation loss with negatives.
            gallery: make the retrieval page of evaluation.gallery, if the task ranks clips.
            stop: this process's stop request.

        Returns:
            The result, or None if told to stop.

        Raises:
            UserError: a clip cannot be read under policy error, or more of them than data.decode.max_bad_share.
        """


def build_task(config: ExperimentConfig) -> Task:
    """Build the task of the model of model.kind.

    Raises:
        UserError: an unknown name or a wrong setting.
    """
    name = extensions.models.load(config.model.kind).task
    task: Task = extensions.tasks.load(name).from_config(config)
    return task
