"""Selects and builds decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from frozen_fast.config.extensions import decoders
from frozen_fast.data.decode import decord, pyav, torchcodec
from frozen_fast.data.decode.auto import AutoDecoder
from frozen_fast.data.decode.dali import DaliDecoder
from frozen_fast.data.decode.dali_pipeline import missing as dali_missing
from frozen_fast.data.decode.frame_index import av_missing
from frozen_fast.data.decode.threaded import FrameReader, ThreadedDecoder
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.decode.types import Decoder
from frozen_fast.errors import UserError

BACKENDS = tuple(name for name in decoders.names() if name != "auto")
"""The decoders that auto selects from, including plugins."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """Arguments for building a decoder.

    Attributes:
        device: device of the frames.
        resolution: side of the frames, pixels.
        threads: decoding threads.
        max_pixels: a frame or picture with more pixels is a bad clip.
        crops_only: training crops are resized later (ViewTransform).
    """

    device: torch.device
    resolution: int
    threads: int
    max_pixels: int
    crops_only: bool = False

    def transform(self) -> ViewTransform:
        """The transform from decoded frames to the requested view."""
        return ViewTransform(self.resolution, crops_only=self.crops_only)


@dataclass(frozen=True)
class DecoderKind:
    """An entry of the table extensions.decoders.

    Attributes:
        missing: returns why the decoder cannot be used, or None.
        build: builds it; called in the thread or process that uses it.
    """

    missing: Callable[[], str | None]
    build: Callable[[DecoderSettings], Decoder]


def _threaded(name: str, read_frames: FrameReader, settings: DecoderSettings, *, needs_times: bool) -> ThreadedDecoder:
    return ThreadedDecoder(
        name,
        read_frames,
        settings.transform(),
        threads=settings.threads,
        max_pixels=settings.max_pixels,
        needs_times=needs_times,
    )


def _dali(settings: DecoderSettings) -> Decoder:
    pictures = _threaded("pil", pyav.read_frames, replace(settings, threads=1), needs_times=False)
    others = [other for other in BACKENDS if other != "dali" and _missing(other) is None]
    return DaliDecoder(
        device=settings.device,
        resolution=settings.resolution,
        threads=settings.threads,
        max_pixels=settings.max_pixels,
        pictures=pictures,
        others=others,
    )


def _auto(settings: DecoderSettings) -> Decoder:
    def made(name: str) -> Decoder:
        kind: DecoderKind = decoders.load(name)
        return kind.build(settings)

    return AutoDecoder(made, _missing, device=settings.device, max_pixels=settings.max_pixels)


AUTO = DecoderKind(lambda: None, _auto)
DALI = DecoderKind(dali_missing, _dali)
TORCHCODEC = DecoderKind(
    torchcodec.missing, lambda settings: _threaded("torchcodec", torchcodec.read_frames, settings, needs_times=True)
)
DECORD = DecoderKind(
    decord.missing, lambda settings: _threaded("decord", decord.read_frames, settings, needs_times=True)
)
PYAV = DecoderKind(av_missing, lambda settings: _threaded("pyav", pyav.read_frames, settings, needs_times=False))


@lru_cache
def _missing(backend: str) -> str | None:
    """Why a backend cannot be used, or None. All need PyAV, which indexes the frames."""
    kind: DecoderKind = decoders.load(backend)
    return av_missing() or kind.missing()


def unavailable_backends() -> dict[str, str]:
    """The backends that cannot be used on this machine, and why."""
    reasons = {name: _missing(name) for name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def build_decoder(
    backend: str,
    *,
    device: torch.device | str,
    resolution: int,
    threads: int,
    max_pixels: int,
    crops_only: bool = False,
) -> Decoder:
    """Build a decoder; call it in the thread or process that will use it.

    Args:
        backend: a name of extensions.decoders; auto: the fastest that supports a clip's codec.
        device: device of the frames.
        resolution: side of the frames, pixels.
        threads: decoding threads.
        max_pixels: a frame or picture with more pixels is a bad clip.
        crops_only: training crops are resized later (ViewTransform); dali resizes them itself.

    Raises:
        UserError: an unknown backend, or one that is not installed.
    """
    kind: DecoderKind = decoders.load(backend)
    reason = None if backend == "auto" else _missing(backend)
    if reason is not None:
        raise UserError(f"data.decode.backend: got {backend}, but {reason}; allowed here: auto, {_usable()}")
    return kind.build(
        DecoderSettings(
            device=torch.device(device),
            resolution=resolution,
            threads=threads,
            max_pixels=max_pixels,
            crops_only=crops_only,
        )
    )


def _usable() -> str:
    missing = unavailable_backends()
    return ", ".join(name for name in BACKENDS if name not in missing)
