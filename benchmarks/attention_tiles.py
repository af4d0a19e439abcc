"""The sweep of tile shapes that attention.py --tune runs: each is timed, and its result compared with the rule's.

The fastest tile of a case goes into the table of frozen_kernels.attention.tiles for this GPU's architecture, which the
kernels read. All timings go into attention_tiles.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import DTYPES, Timing, cause, describe_machine, time_in_turns, write_result
from torch import Tensor

from frozen_kernels import divided_attention
from frozen_kernels.attention.qkv_layout import AXES, Axis, Layout, read_layout
from frozen_kernels.attention.tiles import Direction, Tile, case_key, forced, power_of_two, rule, write_table
from frozen_kernels.availability import compute_capability

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], tuple[dict[str, Timing], dict[str, str]]]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference between two tiles' results, as a share of the largest result."""


def candidates(axis: Axis, layout: Layout, dtype: torch.dtype) -> list[Tile]:
    """The tiles to try, the rule's first."""
    most = max(16, power_of_two(layout.patches))
    if axis == "time":
        shapes = product((1, 2, 4, 8, 16, 32, 64), (0,), (1, 2, 4, 8), (1,))
    else:
        shapes = product((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3))
    tried = [Tile(*shape) for shape in shapes if max(shape[0], shape[1]) <= most]
    first = rule(axis, layout, dtype)
    return [first, *(tile for tile in tried if tile != first)]


def sweep(
    axis: Axis,
    direction: Direction,
    tiles: list[Tile],
    run: Callable[[], Tensor],
    device: torch.device,
    timer: Timer = time_in_turns,
) -> tuple[Tile | None, list[dict[str, Any]]]:
    """Time a launch in every tile.

    Args:
        axis: "time" or "space".
        direction: the launch that `run` makes.
        tiles: what to try; the first one's result is what the others are compared with.
        run: computes a result again.
        device: where.
        timer: as measure.time_in_turns.

    Returns:
        The fastest tile, none where all fail; and a row per tile, with seconds or the cause of its failure.
    """

    def run_in(tile: Tile) -> Tensor:
        with forced(axis, direction, tile):
            return run()

    named = {str(index): tile for index, tile in enumerate(tiles)}
    failed: dict[str, str] = {}
    expected: Tensor | None = None
    for name, tile in named.items():
        try:
            result = run_in(tile)
            expected = result if expected is None else expected
            check(result, expected)
        except Exception as error:  # Triton's own derive from Exception alone
            failed[name] = cause(error)
    timings, slow = timer({name: partial(run_in, tile) for name, tile in named.items() if name not in failed}, device)
    failed |= slow
    rows = []
    for name, tile in named.items():
        outcome = {"failed": failed[name]} if name in failed else {"seconds": asdict(timings[name])}
        rows.append({"tile": asdict(tile), **outcome})
    if not timings:
        return None, rows
    return named[min(timings, key=lambda name: timings[name].median)], rows


def check(result: Tensor, expected: Tensor) -> None:
    """Raise ValueError where a result is another one."""
    apart = (result.float() - expected.float()).abs().max().item() / expected.float().abs().max().item()
    if not apart <= TOLERANCE[result.dtype]:
        raise ValueError(f"the result differs by {apart:.3g} of the largest value")


def passes(qkv: Tensor, frames: int, axis: Axis) -> dict[Direction, Callable[[], Tensor]]:
    """The forward pass without a graph, and the backward pass of one forward pass in the rule's tile."""
    out = divided_attention(qkv, frames, axis, backend="triton")
    grad = torch.ones_like(out)

    def forward() -> Tensor:
        with torch.no_grad():
            return divided_attention(qkv, frames, axis, backend="triton")

    def backward() -> Tensor:
        (result,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
        return result

    return {"forward": forward, "backward": backward}


def tune(options: argparse.Namespace, device: torch.device, pairs: list[tuple[int, int]], dtypes: list[str]) -> None:
    """Sweep the cases of the command line; the table and the result file are written after every one."""
    capability = compute_capability(device)
    about = describe_machine(device)
    rows: list[dict[str, Any]] = []
    for dtype, axis, (frames, batch) in product(dtypes, AXES, pairs):
        tokens = 1 + frames * options.patches
        shape = (batch, tokens, 3, options.heads, options.head_width)
        qkv = torch.randn(shape, device=device, dtype=DTYPES[dtype]).requires_grad_()
        layout = read_layout(qkv, frames, axis)
        for direction, run in passes(qkv, frames, axis).items():
            key = case_key(axis, direction, layout, qkv.dtype)
            best, found = sweep(axis, direction, candidates(axis, layout, qkv.dtype), run, device)
            rows += [{"case": key, "batch": batch, **row} for row in found]
            if best is not None:
                path = write_table(capability, {key: best}, about)
                print(f"{key}: {best} in {path}", flush=True)
            else:
                print(f"{key}: every tile fails: {found[0]['failed']}", flush=True)
            write_result(Path(options.output) / "attention_tiles.json", device, vars(options), {"rows": rows})
