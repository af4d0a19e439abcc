"""Decodes frames with torchcodec in exact seek mode. It needs FFmpeg's shared libraries."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from frozen_fast.data.decode.excerpt import excerpt
from frozen_fast.data.decode.frame_index import ClipIndex
from frozen_fast.data.decode.pyav import upright
from frozen_fast.data.decode.types import ClipError

_TIME_TOLERANCE_SECONDS = 2e-3  # Matroska holds milliseconds


def missing() -> str | None:
    """Why torchcodec cannot be used, or None; tested by decoding a frame.

    torchcodec 0.10 loads FFmpeg's libraries when it is imported, torchcodec 0.17 when something is decoded.
    """
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(_smallest_video()).get_frame_at(0)
    except ImportError as error:
        return f"torchcodec is not installed ({error})"
    except (RuntimeError, OSError):  # a long report, one paragraph per FFmpeg version
        return (
            "torchcodec finds no FFmpeg shared libraries of a supported version: install the system's ffmpeg package, "
            "or set LD_LIBRARY_PATH to what `python -m frozen_fast.data.decode.ffmpeg_libraries` prints"
        )
    return None


def _smallest_video() -> bytes:
    """One black frame of 16 x 16 pixels, MJPEG in AVI."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def read_frames(path: str, index: ClipIndex, frame_indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Read frames by number: uint8 [N, H, W, 3], upright.

    Raises:
        ClipError: decode_failed; also if torchcodec's frames differ from the packets.
    """
    from torchcodec.decoders import VideoDecoder

    cut = None if index.plain else excerpt(path, index, frame_indices, max_pixels)  # it miscounts edit lists
    count = cut.num_frames if cut else index.info.num_frames
    numbers = cut.frame_indices.tolist() if cut else list(frame_indices)
    try:
        decoder = VideoDecoder(
            cut.encoded.tobytes() if cut else path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        if len(decoder) != count:
            raise ClipError("decode_failed", f"torchcodec counts {len(decoder)} frames, the file has {count}", path)
        batch = decoder.get_frames_at(numbers)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ClipError("decode_failed", " ".join(str(error).split())[:200], path) from error
    if cut is None:
        start = decoder.metadata.begin_stream_seconds_from_content or 0.0
        expected = index.info.presentation_seconds[numbers]
        if np.abs(batch.pts_seconds.numpy() - start - expected).max() > _TIME_TOLERANCE_SECONDS:
            raise ClipError("decode_failed", "torchcodec's frames appear at other times than the packets say", path)
    frames_NHWC = batch.data.numpy()
    if not getattr(decoder.metadata, "rotation", None):  # newer versions tell the file's rotation and apply it
        frames_NHWC = np.stack([upright(frame, index.info.rotation_degrees) for frame in frames_NHWC])
    return frames_NHWC
