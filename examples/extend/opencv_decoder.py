"""A decoder: frames read by OpenCV, one after the other, up to the last one that is wanted."""

from collections.abc import Sequence

import numpy as np

from frozen_fast.data.decode.backends import DecoderKind, DecoderSettings
from frozen_fast.data.decode.frame_index import ClipIndex
from frozen_fast.data.decode.threaded import ThreadedDecoder
from frozen_fast.data.decode.types import ClipError


def missing() -> str | None:
    """Why OpenCV cannot be used here, or None."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        return f"OpenCV cannot be imported ({error})"
    return None


def read_frames(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Read frames by number, ascending: uint8 [N, H, W, 3], RGB, upright.

    Raises:
        ClipError: a frame is missing.
    """
    import cv2

    capture = cv2.VideoCapture(path)
    frames = []
    try:
        for number in range(frame_indices[-1] + 1):
            if not capture.grab():
                raise ClipError("decode_failed", f"frame {number} of {index.info.num_frames} does not decode", path)
            if number in frame_indices:
                frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    return np.stack(frames)


def build(settings: DecoderSettings) -> ThreadedDecoder:
    """A thread per clip; the package's transform makes the model's input of what read_frames returns."""
    return ThreadedDecoder(
        "opencv",
        read_frames,
        settings.transform(),
        threads=settings.threads,
        max_pixels=settings.max_pixels,
        needs_times=False,
    )


OPENCV = DecoderKind(missing, build)
