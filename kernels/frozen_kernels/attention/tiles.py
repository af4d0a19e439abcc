"""Tile shapes of the Triton attention kernels: a rule for every case, and tables measured per architecture.

`python benchmarks/attention.py --tune` writes a table named by the compute capability, as attention_tiles_sm_90.json,
into the folder of frozen_kernels.cache. The kernels read it from there, or else from the folder of this file. A case
without an entry follows the rule. Axis letters: see qkv_layout.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from frozen_kernels.attention.qkv_layout import Axis, Layout
from frozen_kernels.availability import compute_capability
from frozen_kernels.cache import cache_folder

logger = logging.getLogger(__name__)

Direction = Literal["forward", "backward"]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows of a program (queries or positions), keys of a step, warps, steps loaded ahead.

    The time axis has all keys of a position in one step: keys is 0 there.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        """Refuse what no kernel takes: sizes are powers of two, and all but keys at least 1."""
        for name, value in asdict(self).items():
            least = 0 if name == "keys" else 1
            power = name == "stages" or (isinstance(value, int) and value & (value - 1) == 0)
            if not isinstance(value, int) or value < least or not power:
                raise ValueError(f"{name}: got {value!r}; allowed: a power of two from {least} (stages: any number)")


_forced: dict[tuple[str, str], Tile] = {}


def power_of_two(number: int) -> int:
    """The number rounded up to a power of two."""
    return 1 << (number - 1).bit_length()


def padded_width(head_width: int) -> int:
    """D rounded up to a power of two, at least 16 (the smallest side of a matrix unit's product)."""
    return max(16, power_of_two(head_width))


def tile_of(axis: Axis, direction: Direction, layout: Layout, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a launch: the table's of the device's architecture, or the rule's."""
    forced = _forced.get((axis, direction))
    if forced is not None:
        return forced
    capability = compute_capability(device) if device.type == "cuda" else None
    return _settled(axis, direction, layout.frames, layout.patches, layout.head_width, dtype, capability)


@lru_cache(maxsize=256)
def _settled(
    axis: Axis,
    direction: Direction,
    frames: int,
    patches: int,
    head_width: int,
    dtype: torch.dtype,
    capability: Capability | None,
) -> Tile:
    layout = Layout(1, frames, patches, 1, head_width)
    measured = {} if capability is None else read_table(capability)
    return measured.get(case_key(axis, direction, layout, dtype)) or rule(axis, layout, dtype)


def rule(axis: Axis, layout: Layout, dtype: torch.dtype) -> Tile:
    """Return the tile of a case without a measurement.

    Time: few enough positions that tiles [T, rows, D] stay in registers (no spills on sm_90). Space: at least 16
    queries and keys, as matrix units want; wide heads load nothing ahead, so that their tiles fit the 100 KiB of shared
    memory of smaller GPUs.
    """
    width, patches = padded_width(layout.head_width), power_of_two(layout.patches)
    if axis == "time":
        elements = {1: 2048, 2: 512, 4: 512, 8: 256, 16: 128}[power_of_two(layout.frames)]
        return Tile(min(max(1, elements // width), patches), 0, 4, 1)
    side = max(16, min(32 if dtype == torch.float32 else 64, patches))
    if width > 64:
        return Tile(side, side, 8, 1)
    return Tile(side, side, 8 if dtype == torch.float32 else 4, 3)


def case_key(axis: Axis, direction: Direction, layout: Layout, dtype: torch.dtype) -> str:
    """A case's key in a table; on the space axis the number of frames only multiplies the programs."""
    frames = f" T={layout.frames}" if axis == "time" else ""
    return f"{axis} {direction}{frames} P={layout.patches} D={layout.head_width} {str(dtype).removeprefix('torch.')}"


def table_name(capability: Capability) -> str:
    """File name of an architecture's table."""
    return f"attention_tiles_sm_{capability[0]}{capability[1]}.json"


def read_table(capability: Capability) -> dict[str, Tile]:
    """An architecture's measured tiles by case_key; empty where there is no table, or with a warning a damaged one."""
    for folder in (cache_folder(), Path(__file__).parent):
        path = folder / table_name(capability)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
            return {key: Tile(**entry) for key, entry in entries.items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is not a table of tiles (%s): the kernels' own rule is used", path, error)
            return {}
    return {}


def write_table(capability: Capability, tiles: Mapping[str, Tile], about: Mapping[str, Any]) -> Path:
    """Add measured tiles to an architecture's table in the cache folder.

    Args:
        capability: compute capability of the device.
        tiles: by case_key; they replace entries of the same key.
        about: device and versions, kept for the reader of the file.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written.
    """
    entries = {key: asdict(tile) for key, tile in {**read_table(capability), **tiles}.items()}
    path = cache_folder() / table_name(capability)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": dict(about), "tiles": entries}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    _settled.cache_clear()
    return path


@contextmanager
def forced(axis: Axis, direction: Direction, tile: Tile) -> Iterator[None]:
    """Cut every launch of an axis and direction in this way, in all threads."""
    _forced[axis, direction] = tile
    try:
        yield
    finally:
        del _forced[axis, direction]
