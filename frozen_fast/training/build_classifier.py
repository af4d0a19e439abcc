"""Builds a classifier for training: its classes, its tower and the initial weights of its head.

Axis letters: C classes, P prompts, E width of the common space, D width of the tower.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.config.extensions import video_towers
from frozen_fast.config.model_defaults import with_model_defaults
from frozen_fast.config.schema import ClassificationConfig
from frozen_fast.data import Source
from frozen_fast.errors import UserError
from frozen_fast.evaluation.classification import prompts_of
from frozen_fast.models.classifier import Classifier
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.from_config import check_agreement, check_model, load_checkpoint
from frozen_fast.models.load_model import stored_kind
from frozen_fast.models.pretrained import checkpoint_of_run, read_model
from frozen_fast.models.video_side import VideoSide

log = logging.getLogger(__name__)


def build_classifier(
    config: ExperimentConfig, sources: Mapping[str, Source], *, resume_from: Path | None = None
) -> Classifier:
    """Build the classifier that a run starts from or resumes, on the CPU; random weights are drawn from config.seed.

    Args:
        config: the experiment.
        sources: the training sources.
        resume_from: this run's checkpoint.

    Raises:
        UserError: the classes, the tower or the checkpoint do not fit the config.
    """
    classes = classes_of(config.classification, sources)
    frames = [stage.frames for stage in config.curriculum.stages]
    if resume_from is not None:
        return Classifier.from_pretrained(resume_from, max_frames=max(frames), keep_rows=True, config=config.model)
    torch.manual_seed(config.seed)
    if config.model.checkpoint is not None:
        return _from_checkpoint(config, classes, first_frames=frames[0], max_frames=max(frames))
    if config.classification.head == "class_names":
        allowed = "random, or a retrieval checkpoint as model.checkpoint"
        raise UserError(f"classification.head: got 'class_names' without model.checkpoint; allowed: {allowed}")
    section = with_model_defaults(config.model)
    check_model(section, [(f"curriculum.stages[{index}].frames", number) for index, number in enumerate(frames)])
    tower = video_towers.load(str(section.video.tower)).from_config(section.video, max_frames=max(frames))
    augmentation = config.data.augmentation
    return Classifier(
        tower,
        classes,
        dropout=config.classification.dropout,
        learned_frames=frames[0],
        mean=augmentation.mean,
        std=augmentation.std,
    )


def _from_checkpoint(
    config: ExperimentConfig, classes: tuple[str, ...], *, first_frames: int, max_frames: int
) -> Classifier:
    """Build a head on the video tower of a checkpoint; a classifier's head is kept if its classes are the same."""
    section, settings = config.model, config.classification
    path = checkpoint_of_run(Path(str(section.checkpoint)).expanduser())
    start: VideoSide
    if path.is_dir() and stored_kind(path) == Classifier.kind:
        start = Classifier.from_pretrained(path, max_frames=max_frames, config=section)
        start.expand_frames(max(first_frames, start.learned_frames), section.expansion)
        if start.classes == classes:
            start.dropout.p = settings.dropout
            return start
        log.info("model.checkpoint has other classes: its video tower is used, and the head is initialised at random")
    elif settings.head == "class_names":
        start = load_checkpoint(section, max_frames=max_frames)
    else:  # no text is read, so no tokenizer is needed
        stored = read_model(path, video_heads=section.video.heads, text_heads=section.text.heads)
        check_agreement(section, stored)
        start = DualEncoder.from_stored(stored, path, None, section.expansion, max_frames=max_frames, config=section)
    start.expand_frames(max(first_frames, start.learned_frames), section.expansion)
    model = Classifier(
        start.video_model,
        classes,
        dropout=settings.dropout,
        learned_frames=start.learned_frames,
        mean=start.mean,
        std=start.std,
    )
    if settings.head == "class_names":
        _start_from_names(model, start, settings)
    return model


@torch.no_grad()
def _start_from_names(model: Classifier, start: VideoSide, settings: ClassificationConfig) -> None:
    """Set the head's weights to the classes' mean text embeddings, so that logits are dot products with them.

    The norm of a clip's embedding scales all its logits alike, so the initial top-1 equals that of zero-shot
    classification.

    Raises:
        UserError: the checkpoint has no text tower with a tokenizer.
    """
    if not isinstance(start, DualEncoder) or start.tokenizer is None:
        got = "got 'class_names' with a checkpoint that reads no captions"
        raise UserError(f"classification.head: {got}; allowed: random, or a retrieval checkpoint with a tokenizer")
    texts = prompts_of(model.classes, settings.prompts, "classification.prompts")
    directions_CE = start.encode_text(texts).float().view(len(model.classes), len(settings.prompts), -1).mean(dim=1)
    if start.projected:
        projection = cast(nn.Linear, start.vid_proj[-1])
        weight_CD, bias_C = directions_CE @ projection.weight, directions_CE @ projection.bias
    else:
        weight_CD, bias_C = directions_CE, torch.zeros(len(model.classes))
    model.head.weight.copy_(weight_CD)
    model.head.bias.copy_(bias_C)


def classes_of(settings: ClassificationConfig, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Return the sorted classes of a classifier: those of classification.classes, or of all training sources.

    Raises:
        UserError: the file cannot be read, contains a class twice, or lacks a class of the sources; or the sources have
            none.
    """
    found = sorted({name for source in sources.values() for name in source.classes})
    for name, source in sources.items():
        if not source.classes:
            allowed = "sources whose clips carry a class (docs/actions.md)"
            raise UserError(f"data.sources: got {name!r} without classes for model.kind classifier; allowed: {allowed}")
    if settings.classes is None:
        return tuple(found)
    try:
        with open(settings.classes, encoding="utf-8") as file:
            listed = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        allowed = "a text file with one class per line"
        raise UserError(f"classification.classes: got {settings.classes!r} ({error}); allowed: {allowed}") from None
    missing = sorted(set(found) - set(listed))
    if missing:
        got = f"got {settings.classes!r}, which lacks {missing[0]!r}"
        raise UserError(f"classification.classes: {got}; allowed: every class of data.sources")
    return tuple(listed)
