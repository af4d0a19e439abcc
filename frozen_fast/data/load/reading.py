"""Reads clips of both kinds: files with a decoder, packed clips from their shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from frozen_fast.data.decode import ClipError, Decoded, Decoder, DecodeRequest, Kind, VideoInfo
from frozen_fast.data.decode import build_decoder as build_file_decoder
from frozen_fast.data.decode.probe import probe as probe_file
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.shards.decoder import PackedFrameDecoder
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.shards.shard_index import packed_info


def probe(path: str | Path, kind: Kind, *, max_pixels: int) -> VideoInfo:
    """Frame count, size and rate of a file (decode.probe) or of a packed clip such as `shard-00000.tar#17` (its index).

    Raises:
        ClipError: the clip cannot be read; its cause says why.
    """
    where = parse_address(os.fspath(path))
    if where is not None:
        return packed_info(where, kind, max_pixels=max_pixels)
    return probe_file(path, kind, max_pixels=max_pixels)


class ClipDecoder:
    """Decodes packed clips from their shards and other clips with a file decoder, which is created on first use."""

    def __init__(self, name: str, make_files: Callable[[], Decoder], packed: Decoder) -> None:
        self.name = name
        self._make_files = make_files
        self._files: Decoder | None = None
        self._packed = packed

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place."""
        places: dict[bool, list[int]] = {False: [], True: []}
        for place, request in enumerate(requests):
            places[parse_address(os.fspath(request.path)) is not None].append(place)
        outcomes: dict[int, Decoded | ClipError] = {}
        for packed, group in places.items():
            if group:
                decoder = self._packed if packed else self._of_files()
                outcomes.update(zip(group, decoder.decode([requests[place] for place in group]), strict=True))
        return [outcomes[place] for place in range(len(requests))]

    def _of_files(self) -> Decoder:
        if self._files is None:
            self._files = self._make_files()
        return self._files

    def close(self) -> None:
        """Close both."""
        if self._files is not None:
            self._files.close()
        self._packed.close()


def build_decoder(
    backend: str,
    *,
    device: torch.device | str,
    resolution: int,
    threads: int,
    max_pixels: int,
    crops_only: bool = False,
) -> ClipDecoder:
    """Build a decoder of files and of packed clips; call it in the thread or process that will use it.

    Args:
        backend: backend for files, as in decode.build_decoder; packed clips always use "jpeg".
        device: device of the frames.
        resolution: side of the frames, pixels.
        threads: decoding threads.
        max_pixels: a frame or picture with more pixels is a bad clip.
        crops_only: training crops are resized later (ViewTransform).

    Raises:
        UserError: an unknown backend, or one that is not installed.
    """
    make = partial(
        build_file_decoder,
        backend,
        device=device,
        resolution=resolution,
        threads=threads,
        max_pixels=max_pixels,
        crops_only=crops_only,
    )
    packed = PackedFrameDecoder(
        ViewTransform(resolution, crops_only=crops_only), threads=threads, max_pixels=max_pixels
    )
    if backend == "auto":
        return ClipDecoder(backend, make, packed)
    named = make()  # a backend that is not installed is an error even if every clip is packed
    return ClipDecoder(backend, lambda: named, packed)
