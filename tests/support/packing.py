"""Small sources of encoded clips, packed; and functions that do harm in packing processes (importable there)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.load.reading import ClipDecoder, build_decoder
from frozen_fast.data.packing.extract import PackSettings
from frozen_fast.data.packing.pack_shards import PackLimits, PackSummary, pack_source
from frozen_fast.data.sources import Clip, Source, read_source
from support import datasets, videos

FRAMES = 20
RESOLUTION = 96
SMALL = PackSettings(frames_per_clip=4, shard_bytes=20_000)


def write_vp9(path: Path, number: int) -> None:
    """A clip of 20 coded frames; `number` changes its size, so that no two files are alike."""
    videos.write_video(path, "libvpx-vp9", frames=FRAMES, width=96 + 2 * number, options=videos.VP9)


def manifest(folder: Path, count: int, **fields: Any) -> Path:
    """A manifest of VP9 clips c0, c1, .."""
    return datasets.manifest_folder(folder, count, write_clip=write_vp9, **fields)


def source_of(path: Path, *, split: str = "", **fields: Any) -> Source:
    """The source of a manifest file, or of a packed folder."""
    form = "shards" if path.is_dir() else "manifest"
    return read_source(SourceConfig(name="web", format=form, path=str(path), split=split, **fields))


def pack(source: Source, folder: Path, settings: PackSettings = SMALL, **limits: Any) -> PackSummary:
    """Pack in this process."""
    return pack_source(source, folder, settings, PackLimits(**limits))


def decoder(backend: str = "pyav", threads: int = 1) -> ClipDecoder:
    """A decoder whose frames are pixel values 0-255."""
    return build_decoder(backend, device="cpu", resolution=RESOLUTION, threads=threads, max_pixels=10**6)


def codes(frames_TCHW: torch.Tensor) -> list[int]:
    """The frame numbers in decoded frames."""
    return [videos.read_code(frame.permute(1, 2, 0).numpy()) for frame in frames_TCHW]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def crash_on_odd(clip: Clip) -> str:
    """Ends its process without a word where the clip's number is odd, as a decoder's segmentation fault does."""
    if int(clip.id[1:]) % 2:
        os._exit(11)
    return clip.id


def hang_on_two(clip: Clip) -> str:
    """Does not come back from clip c2."""
    if clip.id == "c2":
        time.sleep(600)
    return clip.id
