"""Decoders and evaluation loaders for a model's frames, shared by evaluation and search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from frozen_fast.config.schema import DecodeConfig, EvaluationConfig, SamplingConfig
from frozen_fast.data.decode import Decoder
from frozen_fast.data.load.evaluation_loader import EvaluationLoader
from frozen_fast.data.load.load_settings import load_settings
from frozen_fast.data.load.reading import build_decoder
from frozen_fast.data.plan.frame_sampling import Segments
from frozen_fast.data.sources import Source

RESIZE_RESOLUTION = 224
"""The resolution to which evaluation.resize refers."""


@dataclass(frozen=True)
class FrameFormat:
    """The frames that a model takes.

    Attributes:
        resolution: side in pixels.
        mean: normalisation mean, RGB in [0, 1].
        std: normalisation standard deviation.
    """

    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def decoder_factory(decode: DecodeConfig, frames: FrameFormat, device: torch.device) -> Callable[[], Decoder]:
    """Return a picklable function that creates a decoder in the thread or process that uses it.

    Loader processes decode on the CPU; the background thread decodes on the model's device if the backend supports it.
    data.decode.resize sets where training crops are resized.
    """
    on_device = decode.resize == "device" or (decode.resize == "auto" and device.type == "cuda")
    settings = load_settings(decode, device)
    return partial(
        build_decoder,
        decode.backend,
        device=torch.device("cpu") if settings.workers else device,
        resolution=frames.resolution,
        threads=settings.threads,
        max_pixels=decode.max_pixels,
        crops_only=on_device,
    )


def build_evaluation_loader(
    source: Source,
    format: FrameFormat,
    *,
    evaluation: EvaluationConfig,
    decode: DecodeConfig,
    device: torch.device,
    frames: int,
    sampling: SamplingConfig | None = None,
    segments: Segments | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationLoader:
    """Build the loader of one source's test windows.

    Args:
        source: the source.
        format: the frames that the model takes.
        evaluation: stride_seconds, max_windows, crops, batch_size and resize are used.
        decode: the data.decode section.
        device: where batches are delivered.
        frames: frames of a window.
        sampling: which frames of a clip; None: windows over T equal segments.
        segments: a window for each segment of a clip instead.
        rank: this process.
        world_size: number of processes.
    """
    return EvaluationLoader(
        source,
        decoder_factory(decode, format, device),
        decode=decode,
        frames=frames,
        stride_seconds=evaluation.stride_seconds,
        max_windows=evaluation.max_windows,
        batch_size=evaluation.batch_size,
        resize=max(1, round(evaluation.resize * format.resolution / RESIZE_RESOLUTION)),
        crops=evaluation.crops,
        sampling=sampling,
        segments=segments,
        rank=rank,
        world_size=world_size,
        device=device,
    )
