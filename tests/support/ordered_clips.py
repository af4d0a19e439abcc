"""Clips whose class is an order of colours, each shown for as long as the others.

A single frame has the same distribution in every class and says nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import av
import numpy as np

from support.datasets import write_manifest

SIDE, FRAMES = 32, 12
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 200, 40),
    "blue": (40, 40, 200),
}
CLASSES = tuple(" then ".join(order) for order in permutations(COLOURS))


def write_ordered(path: Path, label: str, number: int) -> None:
    """A Motion JPEG clip of twelve frames, each of one colour with noise and a brightness of the clip's own."""
    order = label.split(" then ")
    rng = np.random.default_rng(number)
    brightness = rng.uniform(0.6, 1.2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        for frame in range(FRAMES):
            colour = np.array(COLOURS[order[len(order) * frame // FRAMES]])
            picture = np.clip(brightness * colour + rng.normal(0, 20, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def make_ordered(folder: Path, labels: Sequence[str], *, first: int = 0) -> Path:
    """A manifest of a clip of each of these classes, in their order; `first` is the seed of the first clip."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number, label in enumerate(labels):
        path = folder / "clips" / f"m{number}.avi"
        write_ordered(path, label, first + number)
        row = {"id": path.stem, "path": f"clips/{path.name}", "captions": [f"colours: {label}"], "kind": "video"}
        rows.append({**row, "label": label})
    return write_manifest(folder / "manifest.jsonl", rows)
