"""Clips of every form: files go to the video and picture decoders, packed clips to their shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from frozen_fast.data.decode import ClipError, Decoded, Decoder, DecodeRequest, Kind, VideoInfo
from frozen_fast.data.decode import build_decoder as build_file_decoder
from frozen_fast.data.decode.probe import probe as probe_file
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.shards.decoder import PackedFrameDecoder
from frozen_fast.data.shards.index import packed_info
from frozen_fast.data.shards.layout import parse_address


def probe(path: str | Path, kind: Kind, *, max_pixels: int) -> VideoInfo:
    """What a clip holds: of a file as decode.probe says, of a packed clip (`shard-00000.tar#17`) as its index says.

    Raises:
        ClipError: the clip cannot be read; its cause says why.
    """
    where = parse_address(os.fspath(path))
    if where is not None:
        return packed_info(where, kind, max_pixels=max_pixels)
    return probe_file(path, kind, max_pixels=max_pixels)


class ClipDecoder:
    """Sends packed clips to their reader and all others to the decoder of files."""

    def __init__(self, files: Decoder, packed: Decoder) -> None:
        self.name = files.name
        self._files = files
        self._packed = packed

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip becomes a ClipError in its place."""
        is_packed = [parse_address(os.fspath(request.path)) is not None for request in requests]
        outcomes: dict[int, Decoded | ClipError] = {}
        for decoder, packed in ((self._files, False), (self._packed, True)):
            places = [place for place, kind in enumerate(is_packed) if kind is packed]
            if places:
                outcomes.update(zip(places, decoder.decode([requests[place] for place in places]), strict=True))
        return [outcomes[place] for place in range(len(requests))]

    def close(self) -> None:
        """Close both."""
        self._files.close()
        self._packed.close()


def build_decoder(
    backend: str,
    *,
    device: torch.device | str,
    resolution: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    threads: int,
    max_pixels: int,
) -> ClipDecoder:
    """Build a decoder of files and of packed clips; call it in the thread or process that will use it.

    Args:
        backend: for files, as decode.build_decoder takes it; packed clips are always read by "jpeg".
        device: where the frames are wanted.
        resolution: side of the frames, pixels.
        mean: normalisation mean, RGB in [0, 1].
        std: normalisation standard deviation.
        threads: decoding threads.
        max_pixels: a frame or picture with more pixels is a bad clip.

    Raises:
        UserError: an unknown backend, or one that is not installed.
    """
    files = build_file_decoder(
        backend, device=device, resolution=resolution, mean=mean, std=std, threads=threads, max_pixels=max_pixels
    )
    transform = ViewTransform(resolution, mean, std, torch.device(device))
    return ClipDecoder(files, PackedFrameDecoder(transform, threads=threads, max_pixels=max_pixels))
