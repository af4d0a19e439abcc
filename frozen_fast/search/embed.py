"""Clips to vectors: decode the test windows, encode them, average per clip, normalise. The same path as evaluation.

Axis letters: N windows, V clips, D width, Q texts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.config.schema import DecodeConfig, EvaluationConfig
from frozen_fast.data import Clip, EvaluationLoader, Source
from frozen_fast.data.load.for_model import build_evaluation_loader
from frozen_fast.data.load.video_frames import format_of, kind_of
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.models.retrieval_model import Features
from frozen_fast.search.checkpoint_settings import EmbedSettings, check_decoder, with_windows

TEXTS_AT_ONCE = 64

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


def embed_videos(
    model: DualEncoder,
    clips: Sequence[str | Path | Clip],
    *,
    frames: int | None = None,
    windows: str | int = "auto",
    batch_size: int = 32,
    workers: int = 0,
    decoder: str = "auto",
    on_bad_clip: str = "error",
) -> Tensor:
    """Embed clips from their files, as evaluation does with its default settings.

    Args:
        model: on its device; put into eval mode and back.
        clips: paths of videos and pictures, or frozen_fast.data.Clip objects (which may name a stretch of a file).
        frames: frames of a window, up to model.learned_frames; None: as many as the model learned.
        windows: "auto": a window every 2 seconds inside a segment; "middle": one; a number: at most that many.
        batch_size: windows per forward pass.
        workers: loader processes; 0: a background thread.
        decoder: backend that reads frames.
        on_bad_clip: "error", or "nan": a clip that cannot be read gives a row of NaN.

    Returns:
        [V, D] fp32 on the CPU, rows of L2 norm 1, in the order of `clips`.

    Raises:
        UserError: a clip cannot be read (with on_bad_clip="error"), or an argument is out of range.
    """
    if on_bad_clip not in ("error", "nan"):
        raise UserError(f"on_bad_clip: got {on_bad_clip!r}; allowed: error, nan")
    if frames is not None and not 1 <= frames <= model.learned_frames:
        raise UserError(f"frames: got {frames}; allowed: 1 to {model.learned_frames}, those the model has learned")
    defaults = EvaluationConfig()
    settings = EmbedSettings(
        frames=frames or model.learned_frames,
        stride_seconds=defaults.stride_seconds,
        max_windows=defaults.max_windows,
        resize=defaults.resize,
        decoder=decoder,
    )
    source = clip_source(clips)
    if not len(source):
        return torch.empty(0, model.embedding_width)
    check_decoder(decoder)
    policy: Literal["error", "skip"] = "error" if on_bad_clip == "error" else "skip"
    decode = DecodeConfig(backend=decoder, workers=workers, on_bad_clip=policy)
    loader = loader_for(model, source, with_windows(settings, windows), decode, batch_size)
    rows = torch.full((len(source), model.embedding_width), math.nan)
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
    model: DualEncoder, source: Source, settings: EmbedSettings, decode: DecodeConfig, batch_size: int
) -> EvaluationLoader:
    """The loader of a source's test windows for a model; pictures alone have one frame."""
    return build_evaluation_loader(
        source,
        format_of(model),
        evaluation=settings.evaluation(batch_size),
        decode=decode,
        device=model.device,
        frames=1 if source.kind == "image" else settings.frames,
    )


@torch.no_grad()
def clip_vectors(
    model: DualEncoder, loader: EvaluationLoader, autocast: Autocast = contextlib.nullcontext
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
        for index, rows_ND in window_vectors(lambda x: embedding(model, model.video_features(x)), loader, autocast):
            merged = model.merge_windows([{"embedding": row_D[None]} for row_D in rows_ND])
            yield index, F.normalize(merged["embedding"][0], dim=0)
    finally:
        model.train(training)


@torch.no_grad()
def window_vectors(
    encode: Callable[[Any], Tensor], loader: EvaluationLoader, autocast: Autocast = contextlib.nullcontext
) -> Iterator[tuple[int, Tensor]]:
    """The vectors of each clip's windows, as soon as the last of them is encoded.

    A clip of which some windows cannot be read (loader.dropped names it) gives none.

    Args:
        encode: windows of a batch -> [N, D].
        loader: yields windows; closed at the end.
        autocast: around encode.

    Yields:
        (index into the loader's source, [windows of the clip, D] fp32 on the CPU, in the windows' order).
    """
    unfinished: dict[int, list[Tensor]] = {}
    try:
        for batch in loader.batches():
            with autocast():
                rows_ND = encode(batch.windows).float().cpu()
            for row_D, index, windows in zip(rows_ND, batch.clip_indices, batch.clip_windows, strict=True):
                seen = unfinished.setdefault(index, [])
                seen.append(row_D)
                if len(seen) == windows:
                    yield index, torch.stack(unfinished.pop(index))
            for index in loader.dropped:
                unfinished.pop(index, None)
    finally:
        loader.close()


def embedding(model: DualEncoder, features: Features) -> Tensor:
    """The one vector of each caption or clip, fp32 on the CPU.

    Raises:
        UserError: the model keeps more than one tensor of a clip, so that no index of vectors ranks as it does.
    """
    if set(features) != {"embedding"}:
        raise UserError(
            f"checkpoint: got a model of kind {model.kind!r}, whose similarity compares {', '.join(sorted(features))}; "
            "allowed: a model with one embedding per clip"
        )
    return features["embedding"].float().cpu()


@torch.no_grad()
def text_vectors(model: DualEncoder, texts: Sequence[str]) -> Tensor:
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
        raise UserError("--tokenizer: got none, and the checkpoint carries none; allowed: a name or folder")
    blocks = [list(texts[first : first + TEXTS_AT_ONCE]) for first in range(0, len(texts), TEXTS_AT_ONCE)]
    rows = [F.normalize(embedding(model, model.text_features(block)), dim=-1) for block in blocks]
    return torch.cat(rows) if rows else torch.empty(0, model.embedding_width)


def one_vector(model: DualEncoder, path: str, settings: EmbedSettings, batch_size: int = 32) -> Tensor:
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
