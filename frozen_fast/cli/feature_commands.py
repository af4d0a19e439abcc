"""`frozen-fast convert-features` and `make-caption-masks`: feature stores and caption masks."""

from __future__ import annotations

import argparse
import pickle
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
        "--file",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="pickle of a feature that the layout's rule does not find",
    )


def convert_features(arguments: argparse.Namespace) -> int:
    """Convert, and print a summary."""
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
            raise UserError(f"--file: got {pair!r}; allowed: NAME=FILE with an existing file")
        files[name] = Path(path)
    output = Path(arguments.output).expanduser()
    done = convert(root, output, arguments.expert, arguments.text, files=files)
    for feature in (*done.experts, *done.texts):
        print(
            f"{feature.name}: width {feature.width}, one {feature.kind} per video, missing for {feature.missing} videos"
        )
    lists = ", ".join(f"{split.name} ({len(split.videos)})" for split in done.splits) or "none"
    print(f"{done.videos} videos in {output}; splits: {lists}")
    return 0


def make_caption_masks_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `make-caption-masks`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment whose first data source is masked")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one config value")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="the teacher")
    parser.add_argument("--rank-below", type=int, default=100, metavar="R", help="keep captions of rank 1 to R (100)")
    parser.add_argument("--output", required=True, metavar="FILE", help="pickle for data.sources[i].caption_masks")


def make_caption_masks(arguments: argparse.Namespace) -> int:
    """Rank every training caption's video with a teacher, and write a mask of captions to keep."""
    from frozen_fast.common.files import write_atomically
    from frozen_fast.common.logs import set_up_logging
    from frozen_fast.config import check_for_training, load_config
    from frozen_fast.models.experts.expert_model import ExpertModel
    from frozen_fast.parallel.start import start_parallel
    from frozen_fast.training.caption_masks import caption_masks
    from frozen_fast.training.parts import feature_format, load_model, read_training_sources

    set_up_logging()
    config = load_config(arguments.config, arguments.overrides)
    check_for_training(config)
    if arguments.rank_below < 1:
        raise UserError(f"--rank-below: got {arguments.rank_below}; allowed: 1 or more")
    parallel = start_parallel(config)
    try:
        source = next(iter(read_training_sources(config).values()))
        model = load_model(config, Path(arguments.checkpoint), parallel.device)
        if not isinstance(model, ExpertModel):
            raise UserError(f"--checkpoint: got a {model.kind}; allowed: a model of expert features")
        masks = caption_masks(model, source, feature_format(config, model), rank_below=arguments.rank_below)
        write_atomically(Path(arguments.output), pickle.dumps(masks))
    finally:
        parallel.close()
    kept, total = sum(map(sum, masks.values())), sum(map(len, masks.values()))
    print(f"{kept} of {total} captions of {len(masks)} videos kept in {arguments.output}")
    return 0
