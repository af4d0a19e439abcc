"""Files of a folder of packed frames, and addresses of packed clips. Names and types only.

    index.json         written last; without it, packing is not finished
    pack.json          the settings and the source, written first
    clips.jsonl        a manifest (docs/data.md): line i is packed clip i, its path is its address
    clips.npy          CLIP_TABLE, row i is packed clip i
    frames.npy         FRAME_TABLE, the frames of all packed clips in order
    shard-00000.tar    plain tar: 00000017.003.jpg is frame 3 of packed clip 17, 00000017.json describes the clip
    shard-00000.jsonl  journal: one line per clip of the source, including bad clips
    bad_clips.jsonl    clips that could not be read

File names contain numbers, not clip ids, and no file is opened by a name that another file gives.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

VERSION = 1
INDEX, SETTINGS, LOCK = "index.json", "pack.json", ".pack.lock"
CLIPS, CLIP_TABLE, FRAME_TABLE = "clips.jsonl", "clips.npy", "frames.npy"
BAD_CLIPS = "bad_clips.jsonl"
PART = ".part"

TAR_BLOCK_BYTES = 512
TAR_END = bytes(2 * TAR_BLOCK_BYTES)

CLIP_DTYPE = np.dtype(
    [
        ("first_frame", "<u8"),  # row of the frame table
        ("frames", "<u4"),  # stored frames
        ("shard", "<u4"),
        ("height", "<u4"),  # of the stored frames, pixels
        ("width", "<u4"),
        ("original_frames", "<u4"),  # of the clip, before packing
        ("frames_per_second", "<f8"),  # stored frames per second of the clip
    ]
)
FRAME_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the JPEG in its shard, bytes
        ("length", "<u4"),  # bytes
        ("crc32", "<u4"),  # of the JPEG
        ("number", "<u4"),  # frame of the clip, before packing
        ("seconds", "<f8"),  # when it appears, from the clip's beginning
    ]
)

_ADDRESS = re.compile(r"(?:(.*)/)?(shard-[0-9]{5,8}\.tar)#([0-9]{1,12})")


class Address(NamedTuple):
    """Address of a packed clip: `folder/shard-00003.tar#17` is clip 17 of the folder, in shard 3."""

    folder: str
    shard: str
    row: int

    @property
    def file(self) -> str:
        """The shard's path."""
        return f"{self.folder}/{self.shard}"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.tar"


def journal_name(number: int) -> str:
    """The file name of a shard's journal."""
    return f"shard-{number:05d}.jsonl"


def address(shard: int, row: int) -> str:
    """A packed clip's path, relative to its folder."""
    return f"{shard_name(shard)}#{row}"


def parse_address(path: str) -> Address | None:
    """Parse a packed clip's path; None for the path of a file."""
    if "#" not in path:
        return None
    found = _ADDRESS.fullmatch(path)
    if found is None:
        return None
    folder, shard, row = found.groups()
    return Address("." if folder is None else folder, shard, int(row))
