"""A decoder from a function that reads frames: one thread per clip, then torchvision's transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from frozen_fast.data.decode.frame_index import ClipIndex
from frozen_fast.data.decode.pictures import read_picture
from frozen_fast.data.decode.probe import clip_index, probe
from frozen_fast.data.decode.threads import DaemonPool
from frozen_fast.data.decode.transforms import ViewTransform
from frozen_fast.data.decode.types import ClipError, Decoded, DecodeRequest

# (path, index, distinct ascending frame numbers, max_pixels) -> upright uint8 frames [N, H, W, 3], in that order
FrameReader = Callable[[str, ClipIndex, Sequence[int], int], np.ndarray]


def check_frame_indices(request: DecodeRequest, num_frames: int) -> None:
    """Check that the clip has the frame numbers; some decoders return black frames otherwise.

    Raises:
        ValueError: a frame number is out of range.
    """
    wanted = request.frame_indices
    if not wanted or min(wanted) < 0 or max(wanted) >= num_frames:
        raise ValueError(f"{request.path}: frame_indices: got {wanted}; allowed: 0 to {num_frames - 1}, at least one")


def untimed(backend: str, path: str) -> ClipError:
    """The error of a backend that finds frames by time, for a file whose packets tell none."""
    message = f"the file has no frame times, which {backend} needs; data.decode.backend=pyav or auto reads it"
    return ClipError("decode_failed", message, path)


class ThreadedDecoder:
    """Decodes each request in a thread of a pool; each request opens and closes its file."""

    def __init__(
        self,
        name: str,
        reader: FrameReader,
        transform: ViewTransform,
        *,
        threads: int,
        max_pixels: int,
        needs_times: bool,
    ) -> None:
        self.name = name
        self._needs_times = needs_times
        self._reader = reader
        self._transform = transform
        self._max_pixels = max_pixels
        self._pool = DaemonPool(threads, f"decode-{name}")

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded | ClipError]:
        """Decode a batch, in order; a bad clip gives a ClipError in its place."""
        return self._pool.map(self.decode_one, requests)

    def decode_one(self, request: DecodeRequest) -> Decoded | ClipError:
        """Decode one request."""
        path = os.fspath(request.path)
        try:
            if request.kind == "image":
                return self._decode_picture(path, request)
            index = clip_index(path, max_pixels=self._max_pixels)
            check_frame_indices(request, index.info.num_frames)
            distinct, order = np.unique(np.array(request.frame_indices, np.int64), return_inverse=True)
            if not index.seekable and self._needs_times:
                raise untimed(self.name, path)
            frames_NHWC = self._reader(path, index, distinct.tolist(), self._max_pixels)
            expected = (len(distinct), index.info.height, index.info.width, 3)
            if frames_NHWC.shape != expected:
                raise ClipError("decode_failed", f"frames of shape {frames_NHWC.shape}, expected {expected}", path)
            decoded = self._transform(frames_NHWC, request.view, self.name)
        except ClipError as error:
            error.__traceback__ = None  # it would keep the frames of this call alive
            return error
        except OSError as error:
            return ClipError("decode_failed", f"cannot be read: {error.strerror or error}", path)
        return decoded.ordered(order)

    def _decode_picture(self, path: str, request: DecodeRequest) -> Decoded:
        info = probe(path, "image", max_pixels=self._max_pixels)
        check_frame_indices(request, info.num_frames)
        decoded = self._transform(read_picture(path, max_pixels=self._max_pixels), request.view, "pil")
        return decoded.ordered(np.zeros(len(request.frame_indices), np.int64))

    def close(self) -> None:
        """Stop the pool's threads."""
        self._pool.close()
