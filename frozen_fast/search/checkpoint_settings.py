"""A checkpoint for search: its model, its test-time windows, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_fast.config import ExperimentConfig
from frozen_fast.config.schema import EvaluationConfig, SamplingConfig
from frozen_fast.data.decode import BACKENDS, unavailable_backends
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.models.load_model import kind_of_checkpoint, load_model
from frozen_fast.models.pretrained import WEIGHTS_FILE, read_run
from frozen_fast.models.retrieval_model import RetrievalModel

RELEASED_TOKENIZER = "distilbert-base-uncased"
"""The tokenizer of the released files of Frozen in Time, which have none."""

HASHED_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Settings of embedding in addition to the weights; stored in the index, since they change the vectors.

    Attributes:
        frames: frames of a window; 0: as many as the model learned.
        stride_seconds: distance of test windows inside a segment; 0: one window in the middle.
        max_windows: largest number of windows per clip, evenly spread; 0: all.
        resize: short side before the centre crop, for a 224 model.
        decoder: backend that reads frames; backends differ by a few 256ths where colours are subsampled.
        span_seconds: videos are cut into spans of this length; None: a clip is one row.
        scenes: videos are cut where the scene changes.
        sampling: data.sampling of the run, as plain values, where it is not windows over T equal segments.
    """

    frames: int
    stride_seconds: float
    max_windows: int
    resize: int
    decoder: str = "auto"
    span_seconds: float | None = None
    scenes: bool = False
    sampling: dict[str, Any] | None = None

    def evaluation(self, batch_size: int) -> EvaluationConfig:
        """The same settings as the loader of test windows takes them."""
        return EvaluationConfig(
            frames=self.frames,
            stride_seconds=self.stride_seconds,
            max_windows=self.max_windows,
            resize=self.resize,
            batch_size=batch_size,
        )

    def sampling_config(self) -> SamplingConfig | None:
        """Which frames of a clip, as the loader of test windows takes it."""
        return None if self.sampling is None else SamplingConfig(**self.sampling)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def settings_for(
    run: Mapping[str, Any],
    *,
    frames: int | None = None,
    windows: str | int = "auto",
    stride_seconds: float | None = None,
    decoder: str | None = None,
    span_seconds: float | None = None,
    scenes: bool = False,
) -> EmbedSettings:
    """The test-time settings of a checkpoint: those its run was evaluated with, or the evaluation defaults.

    Args:
        run: what the checkpoint says of its run (read_run, RetrievalModel.run).
        frames: frames of a window; None: those of the run's evaluation, or as many as the model learned (given as 0
            in the result: the model says).
        windows: "auto", "middle" (one window), or the most windows of a clip.
        stride_seconds: replaces the run's.
        decoder: replaces the run's.
        span_seconds: as EmbedSettings.
        scenes: as EmbedSettings.
    """
    trained = run.get("config", {})
    evaluation, data = trained.get("evaluation", {}), trained.get("data", {})
    defaults = EvaluationConfig()
    sampling = data.get("sampling", {})
    settings = EmbedSettings(
        frames=frames or _evaluated_frames(run),
        stride_seconds=evaluation.get("stride_seconds", defaults.stride_seconds),
        max_windows=evaluation.get("max_windows", defaults.max_windows),
        resize=evaluation.get("resize", defaults.resize),
        decoder=decoder or data.get("decode", {}).get("backend", "auto"),
        span_seconds=span_seconds,
        scenes=scenes,
        sampling=sampling if sampling.get("rule") == "fixed_rate" else None,
    )
    if stride_seconds is not None:
        settings = replace(settings, stride_seconds=stride_seconds)
    check_decoder(settings.decoder)
    return with_windows(settings, windows)


def _evaluated_frames(run: Mapping[str, Any]) -> int:
    """Frames of a window when the run evaluated this checkpoint; 0: as many as the model learned."""
    if not run:
        return 0
    trained = run["config"]
    frames = trained.get("evaluation", {}).get("frames") or 0
    if not frames and trained.get("model", {}).get("kind", DualEncoder.kind) != DualEncoder.kind:
        frames = trained["curriculum"]["stages"][run["stage"]]["frames"]
    return min(frames, run.get("learned_frames", frames))


def check_decoder(name: str) -> None:
    """Check that a decoder is known and installed.

    Raises:
        UserError: naming what can be used here.
    """
    if name == "auto":
        return
    missing = unavailable_backends()
    usable = ", ".join(["auto", *(backend for backend in BACKENDS if backend not in missing)])
    if name not in BACKENDS:
        raise UserError(f"--decoder: got {name!r}; allowed here: {usable}")
    if name in missing:
        raise UserError(
            f"--decoder: got {name}, as in the run or as requested, but {missing[name]}; allowed here: {usable}"
        )


def with_windows(settings: EmbedSettings, windows: str | int) -> EmbedSettings:
    """Settings with "auto" (unchanged), "middle" (one window a clip) or a largest number of windows.

    Raises:
        UserError: anything else.
    """
    if windows == "auto":
        return settings
    if windows == "middle":
        return replace(settings, stride_seconds=0.0)
    if isinstance(windows, int) and not isinstance(windows, bool) and windows >= 1:
        return replace(settings, max_windows=windows)
    raise UserError(f"windows: got {windows!r}; allowed: auto, middle, or a whole number from 1")


def with_frames_of(settings: EmbedSettings, model: RetrievalModel) -> EmbedSettings:
    """Settings with the model's number of frames where they say none.

    Raises:
        UserError: more frames than the model takes, or none are said for a model that takes any number.
    """
    if settings.frames > model.learned_frames:
        allowed = f"1 to {model.learned_frames}, those the model has learned"
        raise UserError(f"frames: got {settings.frames}; allowed: {allowed}")
    if settings.frames:
        return settings
    if not isinstance(model, DualEncoder):
        allowed = f"1 to {model.learned_frames} (the released models of CLIP2Video took 12)"
        raise UserError(f"frames: got none for a {model.kind} without a run; allowed: {allowed}")
    return replace(settings, frames=model.learned_frames)


def load_for_search(
    checkpoint: Path,
    *,
    frames: int | None,
    kind: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
) -> RetrievalModel:
    """A checkpoint's model in eval mode.

    Args:
        checkpoint: a folder or a released file.
        frames: number of frames to cut or expand the temporal embeddings to; None: the checkpoint's.
        kind: of a released file, as frozen_fast.load_model takes it; None: the folder's, a released file: frozen.
        tokenizer: name or folder; None: the checkpoint's own (a released file: RELEASED_TOKENIZER).
        device: where it runs.

    Raises:
        UserError: it cannot be read, or has no vectors that an index could hold.
    """
    if not checkpoint.exists():
        raise UserError(f"checkpoint: got {str(checkpoint)!r}, which does not exist; allowed: a folder or a .pth file")
    if kind is None and checkpoint.is_file():
        kind = DualEncoder.kind
    kind = kind_of_checkpoint(checkpoint, kind)
    options: dict[str, Any] = {}
    if kind == DualEncoder.kind:
        trained = read_run(checkpoint).get("config", {})
        options = {
            "num_frames": frames,
            "expansion": trained.get("model", {}).get("expansion", "zero"),
            "tokenizer": tokenizer or (None if checkpoint.is_dir() else RELEASED_TOKENIZER),
        }
    elif tokenizer is not None:
        raise UserError(f"--tokenizer: got {tokenizer!r} for a {kind}, which has its own; allowed: none")
    model = load_model(checkpoint, kind, **options).to(device).eval()
    assert model.vector_width  # a kind without vectors is refused here
    return model


def fingerprint(checkpoint: Path) -> str:
    """A SHA-256 of a checkpoint's weights file: two indexes can be compared if theirs are equal.

    Raises:
        UserError: it cannot be read.
    """
    path = checkpoint / WEIGHTS_FILE if checkpoint.is_dir() else checkpoint
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASHED_AT_ONCE):
                digest.update(block)
    except OSError as error:
        raise UserError(f"checkpoint: got {str(path)!r}, which cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def parallel_config(trained: Mapping[str, Any], device: Literal["auto", "cpu", "cuda"] = "auto") -> ExperimentConfig:
    """The config under which processes embed: the precision of a run's config, as in its evaluation."""
    defaults = ExperimentConfig()
    precision = trained.get("training", {}).get("precision", defaults.training.precision)
    return replace(defaults, training=replace(defaults.training, precision=precision, device=device))
