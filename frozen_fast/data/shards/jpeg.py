"""JPEG decoding with torchvision (libjpeg-turbo, releases the GIL) and encoding with Pillow."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

_MARKER, _START, _END = 0xFF, b"\xff\xd8", b"\xff\xd9"
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encode(frame_HWC: np.ndarray, quality: int) -> bytes:
    """A uint8 RGB frame as baseline JPEG, colours at half resolution (as the videos have them)."""
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def size_of(data: memoryview) -> tuple[int, int] | None:
    """A JPEG's (height, width) from its header, None without a header; nothing is decoded."""
    if bytes(data[:2]) != _START:
        return None
    place = 2
    while place + 9 <= len(data):
        if data[place] != _MARKER:
            return None
        kind = data[place + 1]
        if kind == _MARKER:  # fill byte
            place += 1
        elif kind in _FRAME_HEADERS:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        elif kind in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def decode(data: memoryview, height: int, width: int) -> np.ndarray:
    """Decode a JPEG: uint8 RGB [height, width, 3].

    Args:
        data: the file's bytes, writable memory (torch asks for that).
        height: height in the index.
        width: likewise.

    Raises:
        ValueError: the data is not a complete JPEG of this size.
    """
    if size_of(data) != (height, width) or bytes(data[-2:]) != _END:
        raise ValueError(f"no whole JPEG of {width} x {height} pixels (its header says {size_of(data)})")
    try:
        frame_CHW = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(f"damaged JPEG: {str(error).splitlines()[0]}") from error
    return frame_CHW.permute(1, 2, 0).numpy()
