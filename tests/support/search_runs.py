"""Finished tiny runs whose checkpoints search tests embed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.training.run import train
from support.datasets import write_manifest
from support.runs import make_data, tiny_mapping, without_reports


@dataclass(frozen=True)
class SearchRun:
    """A run and what it was made from."""

    folder: Path
    checkpoint: Path
    videos: Path
    pictures: Path
    config: ExperimentConfig


def finished_run(folder: Path, *, videos: int = 12, pictures: int = 4) -> SearchRun:
    """Train one stage of two frames for four steps, evaluated with several windows a clip."""
    data = make_data(folder / "data", videos=videos, pictures=pictures)
    mapping = tiny_mapping(
        data,
        folder / "run",
        curriculum={"stages": [{"frames": 2, "global_batch_size": 4, "steps": 4}]},
        evaluation={
            "every": "end",
            "sources": [{"name": "clips", "path": str(data["videos"])}],
            "stride_seconds": 0.2,
            "batch_size": 4,
        },
    )
    config = config_from_mapping(mapping)
    with without_reports():
        assert train(config) == 0
    checkpoint = folder / "run" / "checkpoints" / "step_00000004"
    return SearchRun(folder / "run", checkpoint, data["videos"], data["pictures"], config)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "yellow": (230, 220, 40)}


def write_colour(path: Path, colour: str, *, frames: int = 30, side: int = 64) -> None:
    """A VP9 clip, 10 frames a second, of a disc of one colour that moves over grey noise."""
    rng = np.random.default_rng(len(path.name))
    rows, columns = np.mgrid[:side, :side]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.repeat(rng.integers(90, 130, (side, side, 1), dtype=np.uint8), 3, axis=2)
            centre = side // 4 + number * side // (2 * frames)
            picture[(rows - side // 2) ** 2 + (columns - centre) ** 2 < (side // 3) ** 2] = COLOURS[colour]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def colour_run(folder: Path) -> SearchRun:
    """Train until the model knows the colours of four clips: searches have a right answer."""
    data = make_data(folder / "data", videos=1, pictures=1)
    rows = []
    for colour in COLOURS:
        path = folder / "data" / f"{colour}.webm"
        write_colour(path, colour)
        captions = [f"a {colour} ball moves right"]
        rows.append({"id": colour, "path": path.name, "captions": captions, "kind": "video"})
    data["videos"] = write_manifest(folder / "data" / "colours.jsonl", rows)
    mapping = tiny_mapping(
        data,
        folder / "run",
        data={"augmentation": {"crop_scale": [0.9, 1.0]}},
        curriculum={"stages": [{"frames": 2, "global_batch_size": 4, "steps": 120}]},
        evaluation={
            "every": "end",
            "sources": [{"name": "colours", "path": str(data["videos"])}],
            "stride_seconds": 0,
            "batch_size": 4,
        },
    )
    config = config_from_mapping(mapping)
    with without_reports():
        assert train(config) == 0
    checkpoint = folder / "run" / "checkpoints" / "step_00000120"
    return SearchRun(folder / "run", checkpoint, data["videos"], data["pictures"], config)
