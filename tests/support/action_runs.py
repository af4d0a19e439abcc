"""Runs of a small classifier from scratch, for tests of action recognition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.runs import read_json


def mapping(data: dict[str, Path], folder: Path, **sections: Any) -> dict[str, Any]:
    """A classifier trained on data["train"] and tested on data["test"]; sections are merged in, one level deep."""
    tree: dict[str, Any] = {
        "name": "orders",
        "run_folder": str(folder),
        "model": {
            "kind": "classifier",
            "video": {
                "size": "pico_patch16_32",
                "attention": "sdpa",
                "time_init": "random",
                "position_init_std": 1.0,
                "temporal_init_std": 1.0,
            },
        },
        "data": {
            "sources": [{"name": "clips", "path": str(data["train"]), "split": ""}],
            "decode": {"backend": "pyav", "threads": 1},
            "augmentation": {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "horizontal_flip": 0.0},
        },
        "curriculum": {"stages": [{"frames": 4, "global_batch_size": 8, "steps": 6}]},
        "optimizer": {"learning_rate": 2e-3, "gradient_clip_norm": 1.0},
        "training": {"precision": "fp32", "device": "cpu"},
        "checkpoints": {"every_steps": 0},
        "evaluation": {
            "every": "end",
            "sources": [{"name": "held_out", "path": str(data["test"]), "split": ""}],
            "stride_seconds": 0.0,
            "resize": 224,
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) and name in tree else section
    return tree


def row_of(run: Path) -> dict[str, Any]:
    (row,) = read_json(run / "metrics.json")["evaluations"]
    return dict(row)
