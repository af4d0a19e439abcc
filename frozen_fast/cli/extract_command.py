"""`frozen-fast extract`: expert features of own clips, and token features of their captions, into a feature store."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozen_fast.cli.search_commands import natural, positive
from frozen_fast.common.progress import progress
from frozen_fast.errors import UserError, some

if TYPE_CHECKING:
    from frozen_fast.config import ExperimentConfig

WITH_PUBLISHED_WEIGHTS = ("timm", "torchvision_video")
"""Towers whose library has weights for each name."""


def extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `extract`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--expert", metavar="NAME", help="extract features of clips under this name")
    what.add_argument("--text", metavar="NAME", help="extract token features of the store's captions under this name")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--tower",
        metavar="TOWER:WHICH",
        help="a tower and its size or name: timm:resnet50, torchvision_video:r2plus1d_18, clip:ViT-B/32; with --text "
        "transformers:NAME or clip:FILE",
    )
    network.add_argument("--checkpoint", metavar="PATH", help="folder, released file or ORG/NAME of a dual encoder")
    network.add_argument("--config", metavar="FILE", help="experiment whose model section defines the tower")
    parser.add_argument(
        "--weights",
        help="weights of --tower, as model.video.weights; none: random (default: pretrained, timm and torchvision)",
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="R", help="pixels along a frame's edge (default: the network's)"
    )
    parser.add_argument("--source", metavar="PATH", help="folder of videos and images, manifest, or packed shards")
    parser.add_argument(
        "--output", required=True, metavar="STORE", help="the store's folder; a store there gets one more feature"
    )
    parser.add_argument(
        "--format", default="auto", help="format of the source: auto, folder, or a format of data.sources"
    )
    parser.add_argument("--split", action="append", default=[], help="split of the source, repeatable (default: all)")
    parser.add_argument(
        "--split-version", default="", help="version of the splits, for data sets with several versions"
    )
    parser.add_argument("--frames", type=positive, metavar="T", help="frames per vector (default: the network's)")
    parser.add_argument(
        "--rate", type=float, default=1.0, metavar="F", help="vectors per second; 0: one for the whole clip (default 1)"
    )
    parser.add_argument(
        "--pool",
        choices=("mean", "none"),
        default="mean",
        help="mean: one vector per clip; none: all its vectors in order of time (default mean)",
    )
    parser.add_argument(
        "--max-vectors", type=natural, default=0, metavar="N", help="largest number of vectors per clip (0: all)"
    )
    parser.add_argument("--max-tokens", type=positive, metavar="L", help="with --text: captions are cut to this length")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="windows per forward pass")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="loader processes (0: a background thread)"
    )
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="decoding threads of a loader")
    parser.add_argument("--decoder", default="auto", metavar="NAME", help="auto, dali, torchcodec, decord or pyav")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the network")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="precision, as training.precision"
    )
    parser.add_argument("--fresh", action="store_true", help="replace the store's feature of this name")


def extract(arguments: argparse.Namespace) -> int:
    """Extract one expert or one text feature; what is extracted already is kept."""
    return _extract_tokens(arguments) if arguments.text is not None else _extract_expert(arguments)


def _extract_expert(arguments: argparse.Namespace) -> int:
    from frozen_fast.models.feature_tower import FeatureTower, checkpoint_tower, feature_tower
    from frozen_fast.search.extract_job import bad_clips_file
    from frozen_fast.search.extract_run import ExtractRequest, extract_to_store

    if arguments.source is None:
        raise UserError("--source: got none; allowed: a folder, a manifest, packed shards")
    request = ExtractRequest(
        name=arguments.expert,
        source=arguments.source,
        output=Path(arguments.output),
        format=arguments.format,
        splits=tuple(arguments.split),
        split_version=arguments.split_version,
        rate=arguments.rate,
        pool=arguments.pool,
        max_vectors=arguments.max_vectors,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        threads=arguments.threads,
        decoder=arguments.decoder,
        device=arguments.device,
        precision=arguments.precision,
        fresh=arguments.fresh,
    )

    def build() -> FeatureTower:
        if arguments.checkpoint is not None:
            return checkpoint_tower(Path(arguments.checkpoint), arguments.frames)
        config = _experiment(arguments, "video")
        return feature_tower(config, arguments.frames, published_pixels=arguments.config is None)

    first_rank = os.environ.get("RANK", "0") == "0"
    summary = extract_to_store(
        request, build, lambda total: progress("extract", total) if first_rank and total else lambda done, bad: None
    )
    if first_rank:
        feature, bad = summary.feature, summary.bad_clips
        print(
            f"{arguments.output}: {feature.name} of width {feature.width}, one {feature.kind} per video; "
            f"{summary.videos} videos ({summary.extracted} extracted, {summary.kept} kept, {feature.missing} without, "
            f"{len(bad)} bad)"
        )
        if bad:
            where = bad_clips_file(request.output, request.name)
            print(f"bad clips: {some([clip.clip_id for clip in bad])}; {where} says why", file=sys.stderr)
    return 0


def _extract_tokens(arguments: argparse.Namespace) -> int:
    import torch

    from frozen_fast.config.extensions import text_towers
    from frozen_fast.config.model_defaults import with_model_defaults
    from frozen_fast.models.dual_encoder import DualEncoder
    from frozen_fast.models.hub import checkpoint_path
    from frozen_fast.search.extract_text import extract_text

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--text: got {os.environ['WORLD_SIZE']} processes; allowed: one")
    if arguments.checkpoint is not None:
        tower = DualEncoder.from_pretrained(checkpoint_path(arguments.checkpoint)).text_model
    else:
        section = with_model_defaults(_experiment(arguments, "text").model).text
        tower = text_towers.load(str(section.tower)).from_config(section)
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    feature = extract_text(
        Path(arguments.output),
        arguments.text,
        tower,
        device=torch.device("cuda" if cuda else "cpu"),
        batch_size=arguments.batch_size,
        fresh=arguments.fresh,
        progress=lambda total: progress("extract", total, unit="caption"),
    )
    print(f"{arguments.output}: {feature.name} of width {feature.width} for each token")
    return 0


def _experiment(arguments: argparse.Namespace, side: str) -> ExperimentConfig:
    """The experiment of --config, or one whose model section says the tower of --tower."""
    from frozen_fast.config import config_from_mapping, load_config
    from frozen_fast.config.extensions import text_towers, video_towers

    if arguments.config is not None:
        return load_config(arguments.config)
    table = video_towers if side == "video" else text_towers
    tower, _, which = arguments.tower.partition(":")
    table.check(tower, "--tower")
    section: dict[str, Any] = {"tower": tower}
    if side == "video":
        if arguments.weights is None and tower not in WITH_PUBLISHED_WEIGHTS:
            raise UserError(f"--weights: got none with the tower {tower}; allowed: a local file, or none (random ones)")
        section["weights"] = arguments.weights or "pretrained"
        section.update({"size": which} if which else {})
        section.update({} if arguments.resolution is None else {"resolution": arguments.resolution})
    else:
        section.update({"name": which} if which else {})
        section.update({} if arguments.max_tokens is None else {"max_tokens": arguments.max_tokens})
        section.update({"weights": "random"} if arguments.weights == "none" else {})
    return config_from_mapping({"model": {side: section}})
