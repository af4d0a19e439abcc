"""Read frames with decord, which turns rotated clips upright by itself."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from frozen_fast.data.decode.excerpt import excerpt
from frozen_fast.data.decode.index import ClipIndex
from frozen_fast.data.decode.types import ClipError


def missing() -> str | None:
    """Why decord cannot be used here, or None."""
    try:
        import decord  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"decord cannot be imported ({error})"
    return None


def read_frames(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Read frames by number: uint8 [N, H, W, 3], upright.

    Raises:
        ClipError: decode_failed; also where decord sees other frames than the packets say.
    """
    import decord

    cut = None if index.plain else excerpt(path, index, frame_indices, max_pixels)  # it ignores edit lists
    count = cut.num_frames if cut else index.info.num_frames
    try:
        source = io.BytesIO(cut.encoded.tobytes()) if cut else path
        reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != count:
            raise ClipError("decode_failed", f"decord counts {len(reader)} frames, the file has {count}", path)
        return reader.get_batch(cut.frame_indices.tolist() if cut else list(frame_indices)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise ClipError("decode_failed", " ".join(str(error).split())[-200:], path) from error
