"""A small JPEG of a clip's middle frame."""

from __future__ import annotations

import io

import torch
from PIL import Image

from frozen_fast.data.decode import ClipError, DecodeRequest, TestView
from frozen_fast.data.load.reading import build_decoder, probe
from frozen_fast.data.load.video_frames import MAX_PIXELS, load_video
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.data.sources import Clip
from frozen_fast.errors import UserError

WIDTH = 320
PACKED_RESOLUTION = 224
JPEG_QUALITY = 80


def preview_jpeg(clip: Clip, width: int = WIDTH) -> bytes:
    """The middle frame of a clip as a JPEG.

    Args:
        clip: a stretch of a video, a picture, or a packed clip.
        width: in pixels; smaller frames stay as they are.

    Raises:
        UserError: the clip cannot be read.
    """
    if parse_address(clip.path) is None:
        frame_CHW = load_video(clip.path, 1, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)[0]
    else:
        frame_CHW = _packed_frame(clip)
    picture = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def _packed_frame(clip: Clip) -> torch.Tensor:
    """The middle stored frame of a packed clip, cropped to a square, uint8 [3, H, W]."""
    decoder = build_decoder(
        "auto",
        device="cpu",
        resolution=PACKED_RESOLUTION,
        threads=1,
        max_pixels=MAX_PIXELS,
    )
    try:
        frames = probe(clip.path, clip.kind, max_pixels=MAX_PIXELS).num_frames
        request = DecodeRequest(clip.path, clip.kind, (frames // 2,), TestView(PACKED_RESOLUTION))
        (outcome,) = decoder.decode([request])
        if isinstance(outcome, ClipError):
            raise outcome
    except ClipError as error:
        raise UserError(f"path: got {clip.path!r}, which cannot be read ({error.cause}: {error.message})") from None
    finally:
        decoder.close()
    return outcome.frames_TCHW[0]
