"""Still pictures: header checks, and conversion of every pixel mode to RGB.

A picture is rotated by its EXIF orientation. Transparent pixels are blended with white. Palettes, grey and CMYK are
converted to RGB; 16-bit and floating-point grey is scaled to 8 bits by the range of its type. The first frame of an
animation is read.
"""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from frozen_fast.data.decode.types import ClipError, VideoInfo

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_BAD_PICTURE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError)


def _opened(path: str, max_pixels: int) -> Image.Image:
    """Open a picture's header; its pixels are not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of decompression bombs
            picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ClipError("too_large", f"more than the allowed {max_pixels} pixels", path) from error
    except UnidentifiedImageError as error:
        raise ClipError("not_a_video", "not a picture that Pillow can read", path) from error
    except _BAD_PICTURE as error:
        raise ClipError("decode_failed", f"unreadable picture header: {error}", path) from error
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        picture.close()
        raise ClipError("too_large", f"a picture of {size} pixels; allowed: {max_pixels} pixels", path)
    return picture


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 if the tag is missing or unreadable."""
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except (*_BAD_PICTURE, TypeError):
        return 1


def read_picture_info(path: str, *, max_pixels: int) -> VideoInfo:
    """A picture's upright size, from its header.

    Raises:
        ClipError: not_a_video, too_large or decode_failed.
    """
    with _opened(path, max_pixels) as picture:
        width, height = picture.size
        if _orientation(picture) in _SIDEWAYS:
            width, height = height, width
    return VideoInfo(num_frames=1, frames_per_second=1.0, width=width, height=height, codec="image")


def is_plain_jpeg(path: str, *, max_pixels: int) -> bool:
    """Whether every JPEG decoder returns the same picture: three components or grey, and an end marker."""
    with _opened(path, max_pixels) as picture:
        if picture.format != "JPEG" or picture.mode not in ("RGB", "L"):
            return False
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 64))
        return b"\xff\xd9" in file.read()  # a cut file has no end marker; Pillow tells, other decoders paint it grey


def read_picture(path: str, *, max_pixels: int) -> np.ndarray:
    """Decode a picture, upright: [1, H, W, 3] uint8 RGB.

    Raises:
        ClipError: not_a_video, too_large, truncated or decode_failed.
    """
    with _opened(path, max_pixels) as picture:
        try:
            picture.load()
        except _BAD_PICTURE as error:
            text = str(error).lower()
            cut = "truncated" in text or "end of file" in text or isinstance(error, EOFError)
            raise ClipError("truncated" if cut else "decode_failed", f"broken picture: {error}", path) from error
        orientation = _orientation(picture)
        rgb = _to_rgb(picture)
        if orientation != 1:
            rgb.getexif()[_EXIF_ORIENTATION] = orientation
            rgb = ImageOps.exif_transpose(rgb)
        return np.array(rgb, np.uint8)[None]


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.asarray(picture, np.float64)
        top = 65535.0 if picture.mode != "F" else max(1.0, float(values.max()))
        grey = np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")
