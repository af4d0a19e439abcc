"""A decoder and a prober that read no file: frames tell their clip, frame number and view. Picklable for workers."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from frozen_fast.data.decode import ClipError, Decoded, DecodeRequest, TrainView, VideoInfo

FRAMES, RATE = 20, 10.0
SIZE = 4


def fake_probe(path: str | Path, kind: str, *, max_pixels: int) -> VideoInfo:
    """20 frames at 10 per second, 40 x 30; a file named *missing* is missing, *long* has 200 frames, *short* 2."""
    name = Path(path).name
    if "missing" in name:
        raise ClipError("missing", "no such file", path)
    frames = 1 if kind == "image" else 200 if "long" in name else 2 if "short" in name else FRAMES
    return VideoInfo(frames, RATE, 40, 30, "fake", presentation_seconds=np.arange(frames) / RATE)


def clip_code(path: str | Path) -> float:
    """The number that a clip's pixels carry in channel 0."""
    return float(zlib.crc32(Path(path).name.encode()) % 10_007)


def view_code(request: DecodeRequest) -> float:
    """The number that a clip's pixels carry in channel 2."""
    return float(zlib.crc32(repr(request.view).encode()) % 10_007)


@dataclass
class FakeDecoder:
    """Channel 0 is the clip, channel 1 the frame's index, channel 2 the view.

    A file named *truncated* cannot be decoded, *crash* raises a plain error, *die* ends the process, *hang* sleeps.
    """

    name: str = "fake"
    decoded_frames: int = 0
    calls: int = 0
    largest_request: int = 0
    closed: bool = False

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        self.calls += 1
        return [self._one(request) for request in requests]

    def _one(self, request: DecodeRequest) -> Decoded | ClipError:
        name = Path(request.path).name
        if "truncated" in name:
            return ClipError("truncated", "fewer frames than claimed", request.path)
        if "crash" in name:
            raise ZeroDivisionError("a defect of the decoder")
        if "die" in name:
            os._exit(9)
        if "hang" in name:
            time.sleep(3600)
        self.decoded_frames += len(request.frame_indices)
        self.largest_request = max(self.largest_request, len(request.frame_indices))
        frames = torch.empty(len(request.frame_indices), 3, SIZE, SIZE)
        frames[:, 0] = clip_code(request.path)
        frames[:, 1] = torch.tensor(request.frame_indices, dtype=torch.float32)[:, None, None]
        frames[:, 2] = view_code(request) if isinstance(request.view, TrainView) else float(request.view.resize)
        return Decoded(frames, self.name)

    def close(self) -> None:
        self.closed = True


def fake_tokenizer(captions: list[str]) -> dict[str, torch.Tensor]:
    """Characters as tokens."""
    width = max(map(len, captions))
    ids = torch.tensor([[ord(character) for character in caption.ljust(width, "\0")] for caption in captions])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
