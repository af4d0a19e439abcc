"""Clips to vectors: decode the test windows, encode them, average per clip, normalise. The same path as evaluation.

Axis letters: N windows, V clips, D width, Q texts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from frozen_fast.config.schema import DecodeConfig
from frozen_fast.data import Clip, EvaluationLoader, Source
from frozen_fast.data.load.for_model import build_evaluation_loader
from frozen_fast.data.load.video_frames import format_of, kind_of
from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import Features, RetrievalModel
from frozen_fast.models.text.tokenizer import TOKENIZER_FORMS
from frozen_fast.search.checkpoint_settings import EmbedSettings, check_decoder, settings_for, with_frames_of

TEXTS_AT_ONCE = 64

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


def embed_videos(
    model: RetrievalModel,
    clips: Sequence[str | Path | Clip],
    frames: int | None = None,
    windows: str | int = "auto",
    *,
    batch_size: int = 32,
    workers: int = 0,
    decoder: str | None = None,
    on_bad_clip: str = "error",
) -> Tensor:
    """RetrievalModel.embed_videos as a function; its docstring has the arguments."""
    if on_bad_clip not in ("error", "nan"):
        raise UserError(f"on_bad_clip: got {on_bad_clip!r}; allowed: error, nan")
    if frames is not None and not 1 <= frames <= model.learned_frames:
        raise UserError(f"frames: got {frames}; allowed: 1 to {model.learned_frames}, those the model has learned")
    settings = settings_for(model.run, frames=frames, windows=windows, decoder=decoder)
    settings = with_frames_of(replace(settings, frames=min(settings.frames, model.learned_frames)), model)
    source = clip_source(clips)
    if not len(source):
        return torch.empty(0, model.vector_width)
    policy: Literal["error", "skip"] = "error" if on_bad_clip == "error" else "skip"
    decode = DecodeConfig(backend=settings.decoder, workers=workers, on_bad_clip=policy)
    loader = loader_for(model, source, settings, decode, batch_size)
    rows = torch.full((len(source), model.vector_width), math.nan)
    for index, row_D in clip_vectors(model, loader):
        rows[index] = row_D
    return rows


def clip_source(clips: Sequence[str | Path | Clip]) -> Source:
    """Paths and clips as one source; a path's id is the path, its kind follows from its suffix."""
    listed = [
        clip if isinstance(clip, Clip) else Clip(os.fspath(clip), os.fspath(clip), (), kind_of(clip)) for clip in clips
    ]
    kind = "image" if listed and all(clip.kind == "image" for clip in listed) else "video"
    return Source("clips", "clips", listed, kind)  # type: ignore[arg-type]


def loader_for(
    model: RetrievalModel, source: Source, settings: EmbedSettings, decode: DecodeConfig, batch_size: int
) -> EvaluationLoader:
    """The loader of a source's test windows for a model; pictures alone have one frame."""
    return build_evaluation_loader(
        source,
        format_of(model),
        evaluation=settings.evaluation(batch_size),
        decode=decode,
        device=model.device,
        frames=1 if source.kind == "image" else settings.frames,
        sampling=settings.sampling_config(),
    )


def clip_vectors(
    model: RetrievalModel, loader: EvaluationLoader, autocast: Autocast = contextlib.nullcontext
) -> Iterator[tuple[int, Tensor]]:
    """Vectors of a loader's clips, each as soon as its last window is encoded.

    A clip of which some windows cannot be read (loader.dropped names it) gives none.

    Args:
        model: put into eval mode and back.
        loader: yields windows.
        autocast: as in the run's evaluation.

    Yields:
        (index into the loader's source, [D] fp32 on the CPU with L2 norm 1).
    """
    training = model.training
    model.eval()
    try:
        for index, windows in window_features(model.video_features, loader, autocast):
            yield index, model.vectors(model.merge_windows(windows))[0]
    finally:
        model.train(training)


@torch.no_grad()
def window_features(
    encode: Callable[[Any], Features], loader: EvaluationLoader, autocast: Autocast = contextlib.nullcontext
) -> Iterator[tuple[int, list[Features]]]:
    """The features of each clip's windows, as soon as the last of them is encoded.

    A clip of which some windows cannot be read (loader.dropped names it) gives none.

    Args:
        encode: a batch's windows -> features.
        loader: yields windows; closed at the end.
        autocast: around encode.

    Yields:
        (index into the loader's source, the clip's windows in order: features with first axis 1, fp32 on the CPU).
    """
    unfinished: dict[int, list[Features]] = {}
    try:
        for batch in loader.batches():
            with autocast():
                features = {name: tensor.float().cpu() for name, tensor in encode(batch.windows).items()}
            for row, (index, windows) in enumerate(zip(batch.clip_indices, batch.clip_windows, strict=True)):
                seen = unfinished.setdefault(index, [])
                seen.append({name: tensor[row : row + 1] for name, tensor in features.items()})
                if len(seen) == windows:
                    yield index, unfinished.pop(index)
            for index in loader.dropped:
                unfinished.pop(index, None)
    finally:
        loader.close()


@torch.no_grad()
def text_vectors(model: RetrievalModel, texts: Sequence[str]) -> Tensor:
    """Vectors of texts.

    Args:
        model: in eval mode.
        texts: Q strings.

    Returns:
        [Q, D] fp32 on the CPU, rows of L2 norm 1.

    Raises:
        UserError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise UserError(f"--tokenizer: got none, and the checkpoint has none; allowed: {TOKENIZER_FORMS}")
    blocks = [list(texts[first : first + TEXTS_AT_ONCE]) for first in range(0, len(texts), TEXTS_AT_ONCE)]
    rows = [model.vectors(model.text_features(block)).cpu() for block in blocks]
    return torch.cat(rows) if rows else torch.empty(0, model.vector_width)


def one_vector(model: RetrievalModel, path: str, settings: EmbedSettings, batch_size: int = 32) -> Tensor:
    """The vector of one file under an index's settings.

    Returns:
        [1, D] fp32.

    Raises:
        UserError: it cannot be read.
    """
    check_decoder(settings.decoder)
    decode = DecodeConfig(backend=settings.decoder, on_bad_clip="error")
    loader = loader_for(model, clip_source([path]), settings, decode, batch_size)
    return torch.stack([row_D for _, row_D in clip_vectors(model, loader)])
