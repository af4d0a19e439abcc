"""Decodes packed clips: reads the bytes of the wanted frames, checks, decodes and transforms them.

Axis letters: N distinct frames, T frames, H and W pixels, C channels (RGB).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frozen_fast.data.decode.threads import DaemonPool
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.decode.types import ClipError, Decoded, DecodeRequest, TestView, TrainView
from frozen_fast.data.shards import jpeg
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.shards.shard_index import index_of
from frozen_fast.data.shards.tar_files import ShardFiles, advise, read_exactly

_NEAR_BYTES = 4096  # frames so close are read at once: a tar header and padding lie between neighbours


@dataclass(frozen=True)
class _Plan:
    """The reads of one request.

    Attributes:
        path: the clip's address, for errors.
        file: the shard.
        shard_bytes: its size, as the index says.
        height: of the stored frames.
        width: likewise.
        frames: [N] rows of the frame table, ascending by offset: the distinct frames.
        order: [T] which of them each wanted frame is.
        view: crop, resize, flip.
    """

    path: str
    file: str
    shard_bytes: int
    height: int
    width: int
    frames: np.ndarray
    order: np.ndarray
    view: TrainView | TestView

    def spans(self) -> list[tuple[int, int, list[int]]]:
        """Reads as (offset, length, frames in it); close frames are read together."""
        spans: list[tuple[int, int, list[int]]] = []
        for number, (offset, length) in enumerate(self.frames[["offset", "length"]].tolist()):
            end = offset + length
            if spans and 0 <= offset - (spans[-1][0] + spans[-1][1]) <= _NEAR_BYTES:
                start, _, inside = spans[-1]
                spans[-1] = (start, end - start, [*inside, number])
            else:
                spans.append((offset, length, [number]))
        return spans


class PackedFrameDecoder:
    """A Decoder (frozen_fast.data.decode.types) for packed clips; `Decoded.backend` is "jpeg".

    Every frame's bytes are compared with their CRC-32 before decoding, because a JPEG decoder
    fills damaged parts with grey without an error.
    """

    name = "jpeg"

    def __init__(self, transform: ViewTransform, *, threads: int, max_pixels: int) -> None:
        self._transform = transform
        self._pool = DaemonPool(threads, "decode-jpeg")
        self._max_pixels = max_pixels
        self._files = ShardFiles()

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place."""
        plans = [self._planned(request) for request in requests]
        if len(plans) > 1:
            self._announce(plans)
        return self._pool.map(self._outcome, plans)

    def _planned(self, request: DecodeRequest) -> _Plan | ClipError:
        path = os.fspath(request.path)
        where = parse_address(path)
        if where is None:
            raise ValueError(f"request.path: got {path!r}; allowed: the address of a packed clip")
        try:
            index = index_of(where)
            index.info(where, request.kind, max_pixels=self._max_pixels)
            row, frames = index.clip(where)
        except ClipError as error:
            return error
        wanted = np.array(request.frame_indices, np.int64)
        if not len(wanted) or wanted.min() < 0 or wanted.max() >= len(frames):
            got = request.frame_indices
            raise ValueError(f"{path}: frame_indices: got {got}; allowed: 0 to {len(frames) - 1}, at least one")
        distinct, order = np.unique(wanted, return_inverse=True)
        size = index.shard_bytes[int(row["shard"])]
        height, width = int(row["height"]), int(row["width"])
        return _Plan(path, where.file, size, height, width, np.array(frames[distinct]), order, request.view)

    def _announce(self, plans: Sequence[_Plan | ClipError]) -> None:
        """Announce all reads of the batch to the system."""
        for plan in plans:
            if isinstance(plan, _Plan):
                try:
                    with self._files.opened(plan.file, plan.shard_bytes) as descriptor:
                        for offset, length, _ in plan.spans():
                            advise(descriptor, offset, length)
                except (ClipError, OSError, OverflowError):
                    continue  # reading says what is wrong

    def _outcome(self, plan: _Plan | ClipError) -> Decoded | ClipError:
        if isinstance(plan, ClipError):
            return plan
        try:
            frames_NHWC = self._read(plan)
        except ClipError as error:
            error.__traceback__ = None  # it would keep the frames of this call alive
            return error
        return self._transform(frames_NHWC, plan.view, self.name).ordered(plan.order)

    def _read(self, plan: _Plan) -> np.ndarray:
        """The distinct frames, [N, H, W, 3] uint8."""
        frames: list[np.ndarray] = []
        with self._files.opened(plan.file, plan.shard_bytes) as descriptor:
            for offset, length, inside in plan.spans():
                if offset + length > plan.shard_bytes:
                    raise ClipError("truncated", f"the index asks for byte {offset + length} of the shard", plan.path)
                data = read_exactly(descriptor, offset, length, plan.path)
                for number in inside:
                    start = int(plan.frames[number]["offset"]) - offset
                    frames.append(self._frame(plan, number, data[start : start + int(plan.frames[number]["length"])]))
        return frames[0][None] if len(frames) == 1 else np.stack(frames)

    @staticmethod
    def _frame(plan: _Plan, number: int, data: memoryview) -> np.ndarray:
        if zlib.crc32(data) != int(plan.frames[number]["crc32"]):
            place = int(plan.frames[number]["offset"])
            raise ClipError("decode_failed", f"damaged: the bytes at {place} do not match their checksum", plan.path)
        try:
            return jpeg.decode(data, plan.height, plan.width)
        except ValueError as error:
            raise ClipError("decode_failed", str(error), plan.path) from error

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.close()
        self._files.close()
