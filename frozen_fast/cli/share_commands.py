"""`frozen-fast push` and `export`: share a model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

from frozen_fast.config.schema import Expansion


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="name on the Hugging Face Hub")
    parser.add_argument(
        "--license", required=True, metavar="NAME", help="licence of the weights, such as mit or cc-by-nc-4.0"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--output", metavar="FOLDER", help="write the folder to this path and upload nothing")


def push(arguments: argparse.Namespace) -> int:
    """Write weights, config, tokenizer and a model card, and upload them."""
    from frozen_fast.models.hub import checkpoint_path
    from frozen_fast.sharing.hub_upload import upload, write_hub_folder

    checkpoint = checkpoint_path(arguments.checkpoint)
    if arguments.output:
        output = Path(arguments.output)
        print(write_hub_folder(checkpoint, output, name=arguments.repo, licence=arguments.license))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_hub_folder(checkpoint, Path(scratch) / "model", name=arguments.repo, licence=arguments.license)
        print(upload(folder, arguments.repo, private=arguments.private))
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint folder or released file")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument("--format", default="onnx", metavar="onnx|torch", help="ONNX (default) or torch.export")
    parser.add_argument("--frames", type=int, metavar="T", help="frames per clip (default: as many as it learned)")
    parser.add_argument(
        "--expansion",
        choices=get_args(Expansion),
        default="zero",
        help="expansion of the temporal embeddings to more frames",
    )


def export(arguments: argparse.Namespace) -> int:
    """Export both towers as programs that run without frozen_fast."""
    from frozen_fast.sharing.tower_export import export_towers

    paths = export_towers(
        arguments.checkpoint,
        Path(arguments.output),
        frames=arguments.frames,
        expansion=arguments.expansion,
        format=arguments.format,
    )
    print("\n".join(str(path) for path in paths))
    return 0
