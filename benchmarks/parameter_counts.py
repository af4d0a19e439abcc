"""Numbers of weights of the video and text backbones, beside those that the paper prints (Tables A.2 and A.3).

    python benchmarks/parameter_counts.py --output benchmarks/results/parameter_counts.json

Towers are built without their weights' values, so nothing is downloaded. The paper counts a backbone alone, without the
other tower and the projections, but with parts that embed nothing: an ImageNet classifier, a decoder. COUNTED builds
those rows as the paper counts them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoModel

from frozen_fast.common.files import write_json
from frozen_fast.config.video_sizes import VIDEO_SIZES
from frozen_fast.evaluation.published import published_row
from frozen_fast.models.text.transformers_tower import KNOWN_ARCHITECTURES, model_from_config
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.timm_frames import TimmFrames
from frozen_fast.models.video.torchvision_video import TorchvisionVideo

VIDEO: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "ResNet-101": (
        "timm resnet101",
        lambda: TimmFrames("resnet101"),
        "the paper counts the ImageNet classifier too",
    ),
    "S3D-G": (
        "torchvision_video s3d",
        lambda: TorchvisionVideo("s3d"),
        "torchvision's S3D has no gates; the paper does not say what its number includes",
    ),
    "R(3D)-101": ("torchvision_video r3d_101", lambda: TorchvisionVideo("r3d_101"), ""),
    "S-Tformer B/16": (
        "space_time base_patch16_224",
        lambda: SpaceTimeTransformer(VIDEO_SIZES["base_patch16_224"], 4),
        "four frames",
    ),
}
"""Row of Table A.2 -> tower, how it is built, remark."""

TEXT = ("t5-small", "t5-base", "distilbert-base-uncased", "bert-base-uncased")
TEXT_REMARKS = dict.fromkeys(
    ("t5-small", "t5-base"), "the encoder alone embeds captions; the paper counts the decoder too"
)

COUNTED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-101": lambda: timm.create_model("resnet101"),
    "t5-small": lambda: AutoModel.from_config(KNOWN_ARCHITECTURES["t5-small"]()),
    "t5-base": lambda: AutoModel.from_config(KNOWN_ARCHITECTURES["t5-base"]()),
}
"""Row -> the whole model that the paper counts, where it is more than the tower."""


def count(build: Callable[[], nn.Module]) -> int:
    """Weights of a module that is built without values."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def measure() -> list[dict[str, Any]]:
    """A row per backbone: {"table", "row", "tower", "parameters", "counted", "printed", "remark"}.

    "parameters" are those of the tower, "counted" those of what the paper counts, "printed" the paper's number.
    """
    rows = []
    for name, (tower, build, remark) in VIDEO.items():
        rows.append(_row("Table A.2", name, tower, count(build), remark))
    for name in TEXT:
        config = KNOWN_ARCHITECTURES[name]()
        parameters = count(lambda config=config: model_from_config(config))  # type: ignore[misc]
        rows.append(_row("Table A.3", name, f"transformers {name}", parameters, TEXT_REMARKS.get(name, "")))
    return rows


def _row(table: str, name: str, tower: str, parameters: int, remark: str) -> dict[str, Any]:
    printed = published_row(table, name).parameters
    return {
        "table": table,
        "row": name,
        "tower": tower,
        "parameters": parameters,
        "counted": count(COUNTED[name]) if name in COUNTED else parameters,
        "printed": printed,
        "remark": remark,
    }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table in millions."""
    lines = ["| table, row | tower | million weights | as the paper counts | printed | |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = [
            "" if row[name] is None else f"{row[name] / 1e6:.1f}" for name in ("parameters", "counted", "printed")
        ]
        cells = (f"{row['table']}, {row['row']}", row["tower"], *numbers, row["remark"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it as JSON where --output says so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON too")
    options = parser.parse_args(arguments)
    rows = measure()
    sys.stdout.write(as_text(rows))
    if options.output is not None:
        versions = {"torch": torch.__version__}
        command = "python benchmarks/parameter_counts.py"
        write_json(options.output, {"command": command, "versions": versions, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
