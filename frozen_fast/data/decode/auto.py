"""The `auto` backend: decodes each clip with the fastest backend for its codec and device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from frozen_fast.data.decode.dali import GPU_CODECS
from frozen_fast.data.decode.probe import clip_index
from frozen_fast.data.decode.types import ClipError, Decoded, Decoder, DecodeRequest

logger = logging.getLogger(__name__)

# Measured on two cores, frames spread over a clip, six codecs and key frame distances: PyAV and torchcodec are equal
# within the noise (and PyAV notices damaged H.264, which torchcodec hides), decord is slower in most.
_CPU_ORDER = ("pyav", "torchcodec", "decord")
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)


class AutoDecoder:
    """The `auto` backend; `Decoded.backend` names the backend of each clip.

    On a GPU: DALI for the codecs and pictures that it reads there; a clip that it cannot decode (such as an
    unsupported profile) is tried once with PyAV before it counts as bad. On a CPU, and for everything else:
    the first installed of the CPU's order. Backends are imported in that order (DALI takes seconds to import);
    a missing one that would have been selected is logged once.
    """

    name = "auto"

    def __init__(
        self,
        make: Callable[[str], Decoder],
        missing: Callable[[str], str | None],
        *,
        device: torch.device,
        max_pixels: int,
    ) -> None:
        self._make = make
        self._max_pixels = max_pixels

        def usable(backend: str) -> bool:
            reason = missing(backend)
            if reason is not None:
                _say_once(f"data.decode.backend=auto does not use {backend}: {reason}")
            return reason is None

        self._uses_dali = device.type == "cuda" and usable("dali")
        self._on_cpu = next((name for name in _CPU_ORDER if usable(name)), "pyav")  # reads pictures too
        self._made: dict[str, Decoder] = {}

    def _backend_for(self, request: DecodeRequest) -> str:
        """The backend's name; clips that cannot be probed get any backend, which reports the error."""
        if request.kind == "image":
            return "dali" if self._uses_dali else "pyav"
        try:
            index = clip_index(request.path, max_pixels=self._max_pixels)
        except ClipError:
            return "pyav"
        if not index.seekable:
            return "pyav"
        return "dali" if self._uses_dali and index.info.codec in GPU_CODECS else self._on_cpu

    def _decode_with(self, backend: str, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        if backend not in self._made:
            self._made[backend] = self._make(backend)
        return self._made[backend].decode(requests)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self._backend_for(request), []).append(place)
        outcomes: dict[int, Decoded | ClipError] = {}
        for backend, group in places.items():
            outcomes.update(zip(group, self._decode_with(backend, [requests[i] for i in group]), strict=True))
        self._second_chance(requests, outcomes, places.get("dali", []))
        return [outcomes[place] for place in range(len(requests))]

    def _second_chance(
        self, requests: Sequence[DecodeRequest], outcomes: dict[int, Decoded | ClipError], places: Sequence[int]
    ) -> None:
        for place in places:
            first = outcomes[place]
            if isinstance(first, ClipError) and first.cause == "decode_failed":
                outcomes[place] = self._decode_with("pyav", [requests[place]])[0]
                if isinstance(outcomes[place], Decoded):
                    path = os.fspath(requests[place].path)
                    _say_once(f"DALI cannot decode some clips that PyAV can, such as {path}: {first.message}")

    def close(self) -> None:
        """Close the backends in use."""
        for decoder in self._made.values():
            decoder.close()
        self._made = {}
