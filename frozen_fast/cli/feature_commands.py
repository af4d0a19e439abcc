"""`frozen-fast convert-features`: released expert features into a feature store."""

from __future__ import annotations

import argparse
from pathlib import Path

from frozen_fast.errors import UserError


def convert_features_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert-features`."""
    parser.add_argument("root", metavar="FOLDER", help="the released structured-symlinks folder")
    parser.add_argument("--output", required=True, metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--expert", action="append", required=True, metavar="NAME", help="such as i3d.i3d.0 or ocr; repeatable"
    )
    parser.add_argument(
        "--text", action="append", required=True, metavar="NAME", help="text features, such as openai; repeatable"
    )
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME=FILE", help="a pickle that the layout's rule does not find"
    )


def convert_features(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    from frozen_fast.common.logs import set_up_logging
    from frozen_fast.data.features.convert_features import convert_features as convert

    set_up_logging()
    root = Path(arguments.root).expanduser()
    if not root.is_dir():
        raise UserError(f"convert-features: got {root}; allowed: the released structured-symlinks folder")
    files = {}
    for pair in arguments.file:
        name, separator, path = pair.partition("=")
        if not separator or not Path(path).is_file():
            raise UserError(f"--file: got {pair!r}; allowed: NAME=FILE with a file that is there")
        files[name] = Path(path)
    output = Path(arguments.output).expanduser()
    done = convert(root, output, arguments.expert, arguments.text, files=files)
    for feature in (*done.experts, *done.texts):
        print(f"{feature.name}: width {feature.width}, one {feature.kind} per video, {feature.missing} videos lack it")
    lists = ", ".join(f"{split.name} ({len(split.videos)})" for split in done.splits) or "none"
    print(f"{done.videos} videos in {output}; splits: {lists}")
    return 0
