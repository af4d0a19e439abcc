"""Decodes frames with decord, which applies rotation tags itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frozen_fast.data.decode.frame_index import ClipIndex
from frozen_fast.data.decode.types import ClipError


def missing() -> str | None:
    """Why decord cannot be used, or None."""
    try:
        import decord  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"decord cannot be imported ({error})"
    return None


def read_frames(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Read frames by number: uint8 [N, H, W, 3], upright.

    Raises:
        ClipError: decode_failed; also if decord's frames differ from the packets.
    """
    import decord

    if not index.plain:  # decord counts every packet as a frame
        message = "the file hides frames (edit list or reference frames), which decord miscounts; "
        raise ClipError("decode_failed", message + "decode.backend pyav or auto reads it", path)
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != index.info.num_frames:
            message = f"decord counts {len(reader)} frames, the file has {index.info.num_frames}"
            raise ClipError("decode_failed", message, path)
        return reader.get_batch(list(frame_indices)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise ClipError("decode_failed", " ".join(str(error).split())[-200:], path) from error
