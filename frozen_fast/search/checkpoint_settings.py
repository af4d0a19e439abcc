"""A checkpoint for search: its model, its test-time windows, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_fast.config import ExperimentConfig
from frozen_fast.config.schema import EvaluationConfig
from frozen_fast.data.decode import BACKENDS, unavailable_backends
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.json"
RELEASED_TOKENIZER = "distilbert-base-uncased"
"""The tokenizer of the released files, which carry none."""

HASHED_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """How clips become vectors, beside the weights; part of an index, since vectors of other settings differ.

    Attributes:
        frames: frames of a window.
        stride_seconds: distance of test windows inside a segment; 0: one window in the middle.
        max_windows: largest number of windows per clip, evenly spread; 0: all.
        resize: short side before the centre crop, for a 224 model.
        decoder: backend that reads frames; backends differ by a few 256ths where colours are subsampled.
        span_seconds: videos are cut into spans of this length; None: a clip is one row.
    """

    frames: int
    stride_seconds: float
    max_windows: int
    resize: int
    decoder: str = "auto"
    span_seconds: float | None = None

    def evaluation(self, batch_size: int) -> EvaluationConfig:
        """The same settings as the loader of test windows takes them."""
        return EvaluationConfig(
            frames=self.frames,
            stride_seconds=self.stride_seconds,
            max_windows=self.max_windows,
            resize=self.resize,
            batch_size=batch_size,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def trained_config(checkpoint: Path) -> dict[str, Any]:
    """The config that a checkpoint folder was trained with (its state.json), as plain values; empty where none says.

    Raises:
        UserError: state.json is there and cannot be read.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint: got {checkpoint}, whose {STATE_FILE} cannot be read ({error})") from None


def settings_for(
    checkpoint: Path,
    *,
    frames: int | None = None,
    windows: str | int = "auto",
    stride_seconds: float | None = None,
    decoder: str | None = None,
    span_seconds: float | None = None,
) -> tuple[EmbedSettings, dict[str, Any]]:
    """The test-time settings of a checkpoint: those its run was evaluated with, or the evaluation defaults.

    Args:
        checkpoint: a folder or a released file.
        frames: frames of a window; None: evaluation.frames of the run, or as many as the model learned (given as 0
            in the result: the model says).
        windows: "auto", "middle" (one window), or the most windows of a clip.
        stride_seconds: replaces the run's.
        decoder: replaces the run's.
        span_seconds: as EmbedSettings.

    Returns:
        (settings, the run's config as plain values).
    """
    trained = trained_config(checkpoint)
    evaluation = trained.get("evaluation", {})
    defaults = EvaluationConfig()
    settings = EmbedSettings(
        frames=frames or evaluation.get("frames") or 0,
        stride_seconds=evaluation.get("stride_seconds", defaults.stride_seconds),
        max_windows=evaluation.get("max_windows", defaults.max_windows),
        resize=evaluation.get("resize", defaults.resize),
        decoder=decoder or trained.get("data", {}).get("decode", {}).get("backend", "auto"),
        span_seconds=span_seconds,
    )
    if stride_seconds is not None:
        settings = replace(settings, stride_seconds=stride_seconds)
    check_decoder(settings.decoder)
    return with_windows(settings, windows), trained


def check_decoder(name: str) -> None:
    """Refuse a decoder that is unknown or not installed.

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
            f"--decoder: got {name}, the run's or as asked for, but {missing[name]}; allowed here: {usable}"
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


def with_learned_frames(settings: EmbedSettings, model: DualEncoder) -> EmbedSettings:
    """Settings with the frames that the loaded model takes."""
    return replace(settings, frames=model.learned_frames)


def load_for_search(
    checkpoint: Path,
    *,
    frames: int | None,
    trained: dict[str, Any],
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
) -> DualEncoder:
    """A checkpoint's model in eval mode.

    Args:
        checkpoint: a folder or a released file.
        frames: number of frames to cut or expand the temporal embeddings to; None: the checkpoint's.
        trained: the run's config as plain values; says how temporal embeddings are expanded.
        tokenizer: name or folder; None: the checkpoint's own (a released file: RELEASED_TOKENIZER).
        device: where it runs.

    Raises:
        UserError: it cannot be read.
    """
    if not checkpoint.exists():
        raise UserError(f"checkpoint: got {str(checkpoint)!r}, which does not exist; allowed: a folder or a .pth file")
    name = tokenizer or (None if checkpoint.is_dir() else RELEASED_TOKENIZER)
    expansion = trained.get("model", {}).get("expansion", "zero")
    return DualEncoder.from_pretrained(checkpoint, frames, expansion, name).to(device).eval()


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


def parallel_config(trained: dict[str, Any], device: Literal["auto", "cpu", "cuda"] = "auto") -> ExperimentConfig:
    """The config under which processes embed: the run's precision, so that evaluation's numbers come out again."""
    defaults = ExperimentConfig()
    precision = trained.get("training", {}).get("precision", defaults.training.precision)
    return replace(defaults, training=replace(defaults.training, precision=precision, device=device))
