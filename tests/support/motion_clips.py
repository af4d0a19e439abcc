"""Clips whose class is a direction of motion: every frame of every class is a square at a place drawn uniformly.

The square moves around a torus (what leaves at one edge comes back at the other), so that a single frame has the same
distribution in every class and says nothing of it.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from support.datasets import write_manifest

SIDE, SQUARE, FRAMES = 32, 12, 8
STEP = SIDE // FRAMES
DIRECTIONS = {"moves right": (0, 1), "moves left": (0, -1), "moves down": (1, 0), "moves up": (-1, 0)}


def write_motion(path: Path, direction: str, number: int) -> None:
    """A Motion JPEG clip of eight frames."""
    rng = np.random.default_rng(number)
    y, x = rng.integers(SIDE, size=2)
    dy, dx = DIRECTIONS[direction]
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:SQUARE, :SQUARE] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        for frame in range(FRAMES):
            shifted = np.roll(picture, (y + frame * STEP * dy, x + frame * STEP * dx), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        container.mux(stream.encode(None))


def make_motions(folder: Path, clips: int, *, first: int = 0) -> Path:
    """A manifest of `clips` clips, the directions in turn."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number in range(clips):
        direction = list(DIRECTIONS)[number % len(DIRECTIONS)]
        path = folder / "clips" / f"m{number}.avi"
        write_motion(path, direction, first + number)
        row = {"id": path.stem, "path": f"clips/{path.name}", "captions": [f"a square {direction}"], "kind": "video"}
        rows.append({**row, "label": direction})
    return write_manifest(folder / "manifest.jsonl", rows)
