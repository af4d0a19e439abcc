"""A finished tiny run whose checkpoint search tests embed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.training.run import train
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
