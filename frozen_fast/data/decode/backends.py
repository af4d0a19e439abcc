"""Choose and build a decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from frozen_fast.data.decode import decord, pyav, torchcodec
from frozen_fast.data.decode.auto import AutoDecoder
from frozen_fast.data.decode.dali import DaliDecoder
from frozen_fast.data.decode.dali_pipeline import missing as dali_missing
from frozen_fast.data.decode.frame_index import av_missing
from frozen_fast.data.decode.threaded import ThreadedDecoder
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.decode.types import Decoder
from frozen_fast.errors import UserError, unknown_name

BACKENDS = ("dali", "torchcodec", "decord", "pyav")
_MISSING: dict[str, Callable[[], str | None]] = {
    "dali": dali_missing,
    "torchcodec": torchcodec.missing,
    "decord": decord.missing,
    "pyav": av_missing,
}


@lru_cache
def _missing(backend: str) -> str | None:
    """Why a backend cannot be used here, or None; PyAV is needed by all, since it finds the frames."""
    return av_missing() or _MISSING[backend]()


def unavailable_backends() -> dict[str, str]:
    """The backends that cannot be used on this machine, and why."""
    reasons = {name: _missing(name) for name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def build_decoder(
    backend: str,
    *,
    device: torch.device | str,
    resolution: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    threads: int,
    max_pixels: int,
) -> Decoder:
    """Build a decoder; call it in the thread or process that will use it.

    Args:
        backend: dali, torchcodec, decord, pyav, or auto: each clip goes to the fastest that reads its codec.
        device: where the frames are wanted.
        resolution: side of the frames, pixels.
        mean: normalisation mean, RGB in [0, 1].
        std: normalisation standard deviation.
        threads: decoding threads.
        max_pixels: a frame or picture with more pixels is a bad clip.

    Raises:
        UserError: an unknown backend, or one that is not installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown_name("data.decode.backend", backend, ("auto", *BACKENDS))
    device = torch.device(device)
    transform = ViewTransform(resolution, mean, std, device)

    def made(name: str) -> Decoder:
        if name != "dali":
            reader = {"pyav": pyav, "torchcodec": torchcodec, "decord": decord}[name].read_frames
            return ThreadedDecoder(
                name, reader, transform, threads=threads, max_pixels=max_pixels, needs_times=name != "pyav"
            )
        return DaliDecoder(
            device=device,
            resolution=resolution,
            mean=mean,
            std=std,
            threads=threads,
            max_pixels=max_pixels,
            pictures=ThreadedDecoder(
                "pil", pyav.read_frames, transform, threads=1, max_pixels=max_pixels, needs_times=False
            ),
            others=[other for other in BACKENDS if other != "dali" and _missing(other) is None],
        )

    if backend == "auto":
        return AutoDecoder(made, _missing, device=device, max_pixels=max_pixels)
    reason = _missing(backend)
    if reason is not None:
        raise UserError(f"data.decode.backend: got {backend}, but {reason}; allowed here: auto, {_usable()}")
    return made(backend)


def _usable() -> str:
    missing = unavailable_backends()
    return ", ".join(name for name in BACKENDS if name not in missing)
