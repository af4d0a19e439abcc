"""Action recognition: cross-entropy over classes, evaluated by top-1, top-5 and the confusion matrix.

Axis letters: B clips of this rank, C classes, V clips of a source.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.common.ranks import mean_over_ranks
from frozen_fast.config import ExperimentConfig
from frozen_fast.data import Clip, Source
from frozen_fast.errors import UserError
from frozen_fast.evaluation.classification import ACCURACIES, classify
from frozen_fast.evaluation.metric_table import VALIDATION_LOSS
from frozen_fast.models.classifier import Classifier
from frozen_fast.models.retrieval_model import Features, RetrievalModel, VideoInput
from frozen_fast.parallel.base import Parallel
from frozen_fast.training.encode import class_numbers, encode_clips
from frozen_fast.training.evaluate import Evaluation, check_bad_share, evaluation_loader
from frozen_fast.training.signals import StopRequest
from frozen_fast.training.task import Task

PROTOCOL = "classification"


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Classification of clips.

    Attributes:
        config: the experiment.
    """

    config: ExperimentConfig
    has_negatives = False

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> ClassificationTask:
        """Build the task; refuse options of retrieval.

        Raises:
            UserError: teachers, re-ranking, zero-shot prompts or a fitted head for a classifier.
        """
        evaluation = config.evaluation
        for key, value in (
            ("distillation.teachers", config.distillation.teachers),
            ("evaluation.rerank", evaluation.rerank),
            ("evaluation.prompts", evaluation.prompts),
            ("evaluation.linear_head", evaluation.linear_head),
            ("loss.learnable_temperature", config.loss.learnable_temperature),
        ):
            if value:
                raise UserError(f"{key}: got {value!r} with model.kind classifier; allowed: the default")
        return cls(config)

    def training_sources(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        """Return the sources with each clip's class in place of its captions."""
        return {name: replace(source, clips=ClassAsCaption(source)) for name, source in sources.items()}

    def inputs(self, video: VideoInput, text: Mapping[str, Tensor]) -> tuple[VideoInput, Mapping[str, Tensor]]:
        """The batch, mixed in pairs where classification.mixup is above 0."""
        if not self.config.classification.mixup:
            return video, text
        assert isinstance(video, Tensor)
        return mixed(video, text["class"], self.config.classification.mixup)

    def loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy. Ranks have equal numbers of clips, so the mean over ranks is that of the whole batch."""
        value = self.rehearsal_loss(model, text, video, parameters, 1)
        return value, mean_over_ranks(value.detach())

    def rehearsal_loss(
        self, model: RetrievalModel, text: Features, video: Features, parameters: Features, world_size: int
    ) -> Tensor:
        """Mean cross-entropy of this rank's clips."""
        smoothing = self.config.classification.label_smoothing
        return F.cross_entropy(video["logits"].float(), text["class"].float(), label_smoothing=smoothing)

    def directions(self) -> dict[str, bool]:
        """Accuracies, and the validation loss."""
        return {VALIDATION_LOSS: False, **dict.fromkeys(ACCURACIES, True)}

    @torch.no_grad()
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
        """Classify the source's clips by the mean probabilities of their windows and crops.

        The row's "loss" is the mean of -log p of the right class, without label smoothing.
        """
        assert isinstance(model, Classifier), "the classifier's task"
        began = time.perf_counter()
        loader, cache, frames = evaluation_loader(self.config, model, source, parallel, frames)
        training = model.training
        model.eval()
        try:
            clips = encode_clips(model, loader, parallel, lambda: stop.asked, cache)
        finally:
            model.train(training)
        if clips is None:
            return None
        with parallel.together():
            if not clips.kept:
                raise UserError(f"source {source.name}: no readable clip; allowed: at least one")
            classes = class_numbers(source, clips.kept, model.classes, "the model")
            logits_VC = clips.stacked()["logits"]
            found = classify(logits_VC.T, classes, model.classes)
        row: dict[str, Any] = {
            "frames": frames,
            "source": source.name,
            "windows": clips.num_windows,
            "num_queries": len(classes),
            "num_videos": len(classes),
            "bad_clips": len(clips.bad_clips),
            "protocol": PROTOCOL,
            "metrics": {name: getattr(found, name) for name in ACCURACIES},
            "loss": float(F.cross_entropy(logits_VC, torch.tensor(classes))),
            "finetuned": asdict(found),
            "seconds": time.perf_counter() - began,
        }
        check_bad_share(self.config, source, clips.bad_clips)
        return Evaluation([row], clips.bad_clips)


def mixed(video_BTCHW: Tensor, class_BC: Tensor, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mixup (Zhang et al., 2018, equation 1): interpolate each clip and its target with another clip of the batch.

    Args:
        video_BTCHW: clips; uint8 pixels stay uint8, rounded.
        class_BC: one-hot classes.
        alpha: parameter of Beta(alpha, alpha), from which the batch's mixing weight is drawn.

    Returns:
        (clips, {"class": targets}); weight and pairs are drawn from torch's global CPU generator.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(video_BTCHW)).to(video_BTCHW.device)
    targets_BC = class_BC.to(video_BTCHW.device)
    mixed_BTCHW = torch.lerp(video_BTCHW[order].float(), video_BTCHW.float(), share)
    if video_BTCHW.dtype == torch.uint8:
        mixed_BTCHW = mixed_BTCHW.round_().to(torch.uint8)
    return mixed_BTCHW, {"class": share * targets_BC + (1 - share) * targets_BC[order]}


@dataclass(frozen=True)
class ClassAsCaption(Sequence[Clip]):
    """A source's clips whose only caption is their class."""

    source: Source

    def __len__(self) -> int:
        return len(self.source.clips)

    @overload
    def __getitem__(self, index: int) -> Clip: ...

    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...

    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        clip = self.source.clips[index]
        if clip.label is None:
            allowed = "clips with a class (docs/actions.md)"
            raise UserError(f"source {self.source.name}: clip {clip.id!r} has no class; allowed: {allowed}")
        return replace(clip, captions=(clip.label,))
