"""Teachers for distillation: frozen models, or embeddings released by TeachText.

Axis letters: B clips of this rank, G clips of all ranks, T frames of the student, F frames of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from frozen_fast.common.ranks import gather_with_gradient, is_distributed
from frozen_fast.config import ExperimentConfig
from frozen_fast.config.schema import TeacherConfig
from frozen_fast.data import Batch
from frozen_fast.data.features.feature_pickle import ArrayInFile, open_feature_pickle
from frozen_fast.data.load.feature_loader import TOKENS
from frozen_fast.errors import UserError, some
from frozen_fast.losses import gathered_loss
from frozen_fast.losses.distillation import TEACHERS, SimilarityDistillation
from frozen_fast.losses.gathered import Compare
from frozen_fast.models.experts.expert_model import ExpertModel
from frozen_fast.models.load_model import load_model
from frozen_fast.models.retrieval_model import Features, RetrievalModel

EMBEDDING = "embedding"


class Teacher(Protocol):
    """Computes a batch's features, and compares them."""

    def features(self, batch: Batch) -> tuple[Features, Features]:
        """Return (text features, video features) of this rank's pairs."""
        ...

    def compare(self, text: Features, video: Features) -> Tensor:
        """sim_KQV."""
        ...


class ModelTeacher:
    """A model of any kind, in eval mode, that reads the student's batch."""

    def __init__(self, model: RetrievalModel, text: str, device: torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._key = f"{TOKENS}/{text}" if text else TOKENS
        self.compare = self._model.pair_similarities

    def features(self, batch: Batch) -> tuple[Features, Features]:
        """Return the teacher's own text features for an expert model, and the captions for other models."""
        if isinstance(self._model, ExpertModel):
            text: Any = {TOKENS: batch.text[self._key]}
        else:
            text = batch.captions if self._model.tokenizer is not None else batch.text
        return self._model.text_features(text), self._model.video_features(batch.video)


class PickleTeacher:
    """Released embeddings: {video: {"vid_embds": {expert: [D]}, "text_embds": {expert: [captions, D]}}}.

    The similarity is the sum over experts of plain dot products, without mixture weights or availability, as released.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        """Open the file; arrays are read on access.

        Raises:
            UserError: the file does not exist, or has another format.
        """
        self._path, self._device = path, device
        self._entries = open_feature_pickle(path)
        first = next(iter(self._entries.values()), None)
        if not isinstance(first, Mapping) or not {"vid_embds", "text_embds"} <= set(first):
            raise UserError(
                f"distillation.teachers: {path} contains no vid_embds and text_embds; allowed: a pickle with both"
            )
        self._experts = sorted(first["vid_embds"])

    def features(self, batch: Batch) -> tuple[Features, Features]:
        """Return the embeddings of the batch's captions and videos, with experts concatenated."""
        absent = [video for video in batch.clip_ids if video not in self._entries]
        if absent:
            raise UserError(f"distillation.teachers: {self._path} lacks {some(absent)}; allowed: the training videos")
        if len(batch.caption_indices) != len(batch.clip_ids):
            raise UserError(f"distillation.teachers: {self._path} needs a feature store's captions; allowed: features")
        text, video = [], []
        for name, caption in zip(batch.clip_ids, batch.caption_indices, strict=True):
            entry = self._entries[name]
            rows = [_values(entry["text_embds"][expert]).reshape(-1, _width(entry, expert)) for expert in self._experts]
            text.append(np.concatenate([row[caption or 0] for row in rows]))
            video.append(np.concatenate([_values(entry["vid_embds"][expert]).ravel() for expert in self._experts]))
        sides = [torch.from_numpy(np.stack(side)).to(self._device) for side in (text, video)]
        return {EMBEDDING: sides[0]}, {EMBEDDING: sides[1]}

    def compare(self, text: Features, video: Features) -> Tensor:
        """Return dot products, K = 1."""
        return (text[EMBEDDING] @ video[EMBEDDING].T)[None]


class Teachers:
    """The teachers of a run, and the distillation loss."""

    def __init__(self, teachers: Sequence[Teacher], *, weight: float, beta: float, frames: int) -> None:
        """Initialise; frames: most frames of a clip for a teacher, 0: the student's frames."""
        self._teachers, self._weight, self.frames = list(teachers), weight, frames
        self._loss = SimilarityDistillation(beta)

    @torch.no_grad()
    def similarity(self, batch: Batch) -> Tensor:
        """Return the mean of the teachers' similarities of all ranks' pairs, [G, G]."""
        total: Tensor | None = None
        for teacher in self._teachers:
            text, video = teacher.features(batch)
            sim_GG = teacher.compare(_gathered(text), _gathered(video)).mean(0).float()
            total = sim_GG if total is None else total + sim_GG
        assert total is not None, "a run without teachers has no Teachers"
        return total / len(self._teachers)

    def loss(self, compare: Compare, text: Features, video: Features, teachers_GG: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss to backpropagate, value) as gathered_loss does, both multiplied by the config's weight."""

        def mean_similarity(own: Features, others: Features) -> Tensor:
            return compare(own, others).mean(0, keepdim=True)

        to_minimise, value = gathered_loss(mean_similarity, self._loss, text, video, {TEACHERS: teachers_GG})
        return self._weight * to_minimise, self._weight * value

    def frames_to_read(self, student: int) -> int:
        """Return the number of frames to read for a student with a given number of frames."""
        return max(student, self.frames)


def student_video(video: Any, frames: int) -> Any:
    """Choose the student's frames among the teacher's: one drawn from each of `frames` equal parts.

    Args:
        video: [B, F, 3, H, W], or another kind of input, which is returned unchanged.
        frames: T.
    """
    if not isinstance(video, Tensor) or video.shape[1] <= frames:
        return video
    edges = torch.linspace(0, video.shape[1], frames + 1).tolist()
    picked = [int(torch.randint(int(low), int(high), ())) for low, high in zip(edges, edges[1:], strict=False)]
    return video[:, picked]


def build_teachers(config: ExperimentConfig, student: RetrievalModel, device: torch.device) -> Teachers | None:
    """Build the config's teachers; None if it names none.

    Raises:
        UserError: a teacher that cannot be read, or that reads other features than the student.
    """
    section = config.distillation
    if not section.teachers:
        return None
    keys = [f"distillation.teachers[{index}]" for index in range(len(section.teachers))]
    teachers = [_build(*pair, config, student, device) for pair in zip(section.teachers, keys, strict=True)]
    frames = max((one.frames or 0 for one in section.teachers), default=0)
    return Teachers(teachers, weight=section.weight, beta=section.beta, frames=frames)


def _build(
    teacher: TeacherConfig, key: str, config: ExperimentConfig, student: RetrievalModel, device: torch.device
) -> Teacher:
    if teacher.pickle is not None:
        return PickleTeacher(Path(teacher.pickle).expanduser(), device)
    assert teacher.checkpoint is not None, "the schema asks for a checkpoint or a pickle"
    path = Path(teacher.checkpoint).expanduser()
    options: dict[str, Any] = {}
    if teacher.frames is not None:
        options["num_frames"] = teacher.frames
    if path.is_file() and teacher.kind == "frozen":
        options["tokenizer"] = config.model.text.tokenizer or config.model.text.name
    model = load_model(path, teacher.kind, **options)
    if isinstance(model, ExpertModel) != isinstance(student, ExpertModel):
        raise UserError(f"{key}: got a {model.kind} for a {student.kind}; allowed: a teacher of the same kind of input")
    if isinstance(model, ExpertModel) and isinstance(student, ExpertModel):
        foreign = sorted(set(model.sizes.names) - set(student.sizes.names))
        if foreign:
            raise UserError(f"{key}: it reads {some(foreign)}; allowed: the student's experts")
    return ModelTeacher(model, teacher.text, device)


def _gathered(features: Features) -> dict[str, Tensor]:
    """Gather all ranks' rows, in rank order."""
    if not is_distributed():
        return dict(features)
    return {name: gather_with_gradient(tensor.float()) for name, tensor in features.items()}


def _values(array: Any) -> np.ndarray:
    return array.read() if isinstance(array, ArrayInFile) else np.asarray(array, dtype=np.float32)


def _width(entry: Mapping[str, Any], expert: str) -> int:
    """Return the width of an expert's embeddings."""
    return int(np.prod(entry["vid_embds"][expert].shape))
