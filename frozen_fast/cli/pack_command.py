"""`frozen-fast pack`: frames of a source's clips into shards, with progress and an estimate of the time left."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from frozen_fast.common.machine import available_cores
from frozen_fast.common.progress import Tell, progress
from frozen_fast.config import ExperimentConfig, load_config
from frozen_fast.config.schema import SourceConfig
from frozen_fast.errors import UserError


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML file of an experiment; one of its sources is packed")
    what.add_argument("--manifest", metavar="FILE", help="a manifest; all of its splits are packed")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --config: set one config value")
    parser.add_argument(
        "--source", metavar="NAME", help="with --config: the source, by name or path such as evaluation.sources[0]"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--frames-per-clip", type=_number, default=8, metavar="F", help="frames to store per clip (default 8)"
    )
    parser.add_argument(
        "--short-side",
        type=_number,
        default=256,
        metavar="PIXELS",
        help="resize larger frames to this short side (default 256)",
    )
    parser.add_argument("--quality", type=_number, default=90, help="JPEG quality (default 90)")
    parser.add_argument(
        "--shard-bytes", type=_number, default=2**30, metavar="BYTES", help="size of a shard (default 1 GiB)"
    )
    parser.add_argument(
        "--workers", type=_number, metavar="N", help="number of processes (default: one per core); 0: this process"
    )


def pack(arguments: argparse.Namespace) -> int:
    """Pack one source, or continue packing it."""
    config, source_config, key = _chosen(arguments)
    from frozen_fast.common.logs import set_up_logging
    from frozen_fast.data.packing.extract import PackSettings
    from frozen_fast.data.packing.pack_shards import PackLimits, pack_source
    from frozen_fast.data.sources import read_source

    set_up_logging()
    settings = PackSettings(
        frames_per_clip=arguments.frames_per_clip,
        short_side=arguments.short_side,
        quality=arguments.quality,
        shard_bytes=arguments.shard_bytes,
    )
    decode = config.data.decode
    limits = PackLimits(
        workers=available_cores() if arguments.workers is None else arguments.workers,
        max_pixels=decode.max_pixels,
        max_bad_share=decode.max_bad_share,
        timeout_seconds=decode.read_timeout_seconds,
    )
    source = read_source(source_config, key)
    summary = pack_source(source, Path(arguments.output), settings, limits, _progress())
    state = "was packed before" if summary.reused else "packed"
    print(
        f"{summary.folder}: {state}: {summary.clips} clips, {summary.frames} frames, {summary.bytes / 1e6:.1f} MB, "
        f"{summary.bad_clips} bad clips"
    )
    return 0


def _chosen(arguments: argparse.Namespace) -> tuple[ExperimentConfig, SourceConfig, str]:
    """The config, the source to pack, and the config key that errors name."""
    if arguments.manifest is not None:
        for field, value in (("overrides", arguments.overrides), ("--source", arguments.source)):
            if value:
                raise UserError(f"{field}: got {value!r} with --manifest; allowed: with --config")
        return ExperimentConfig(), SourceConfig(path=arguments.manifest, split=""), "--manifest"
    config = load_config(arguments.config, arguments.overrides)
    sections = {"data": config.data.sources, "evaluation": config.evaluation.sources}
    sources = {
        f"{section}.sources[{place}]": source
        for section, listed in sections.items()
        for place, source in enumerate(listed)
    }
    allowed = ", ".join(f"{key} ({source.name or source.format})" for key, source in sources.items()) or "none there"
    wanted = arguments.source
    found = [key for key, source in sources.items() if wanted in (None, key, source.name or source.format)]
    if len(found) != 1:
        got = "nothing" if wanted is None else repr(wanted)
        raise UserError(f"--source: got {got}, which names {len(found)} sources; allowed one of: {allowed}")
    return config, sources[found[0]], found[0]


def _progress() -> Callable[[int, int, int], None]:
    """Return a progress function of (clips done, total clips, bad clips)."""
    shown: list[Tell] = []
    bad_before = 0

    def tell(done: int, total: int, bad: int) -> None:
        nonlocal bad_before
        if not shown:
            shown.append(progress("pack", total, done=done - 1))
        newly_bad, bad_before = bad - bad_before, bad
        shown[0](1 - newly_bad, newly_bad)

    return tell


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number, 0 or more")
    return int(text)
