"""`frozen-fast label`: labels for clips from a list, without training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from frozen_fast.cli.search_commands import natural, positive
from frozen_fast.common.progress import progress
from frozen_fast.errors import UserError, some


def label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `label`."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint folder or released file")
    parser.add_argument(
        "--source", required=True, metavar="PATH", help="folder of videos and images, manifest, or packed shards"
    )
    parser.add_argument("--labels", required=True, metavar="FILE", help="one label per line")
    parser.add_argument("--templates", metavar="FILE", help="one sentence per line, with {} in place of the label")
    parser.add_argument("--top", type=positive, default=1, metavar="N", help="labels per clip (default 1)")
    parser.add_argument(
        "--format", default="auto", help="format of the source: auto, folder, or a format of data.sources"
    )
    parser.add_argument("--split", default="", help="split, for formats with splits (default: all)")
    parser.add_argument("--model-kind", metavar="KIND", help="kind of a released file: frozen (default) or clip2video")
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer, for a released file (which has none)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="windows per forward pass")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="loader processes (0: a background thread)"
    )
    parser.add_argument("--device", default="cpu", help="device of the model (default cpu)")


def label(arguments: argparse.Namespace) -> int:
    """Print one JSON line per clip: its id, path, and its labels with their probabilities."""
    from frozen_fast.config.schema import DecodeConfig
    from frozen_fast.data import Source
    from frozen_fast.models.hub import checkpoint_path
    from frozen_fast.search import check_packages

    check_packages()
    from frozen_fast.models.pretrained import read_run
    from frozen_fast.search.checkpoint_settings import load_for_search, settings_for, with_frames_of
    from frozen_fast.search.collection import collect
    from frozen_fast.search.embed import clip_vectors, loader_for
    from frozen_fast.search.row_table import row_clip
    from frozen_fast.search.zero_shot import DEFAULT_TEMPLATES, best_labels, label_vectors, read_lines

    labels = read_lines(Path(arguments.labels), "--labels")
    templates = read_lines(Path(arguments.templates), "--templates") if arguments.templates else DEFAULT_TEMPLATES
    checkpoint = checkpoint_path(arguments.checkpoint)
    settings = settings_for(read_run(checkpoint))
    model = load_for_search(
        checkpoint,
        frames=settings.frames or None,
        kind=arguments.model_kind,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
    )
    settings = with_frames_of(settings, model)
    labels_CD = label_vectors(model, labels, templates)
    found = collect(arguments.source, format=arguments.format, split=arguments.split)
    kind = "image" if all(row["kind"] == "image" for row in found.rows) else "video"
    source = Source("source", found.name, [row_clip(row) for row in found.rows], kind)  # type: ignore[arg-type]
    decode = DecodeConfig(backend=settings.decoder, workers=arguments.workers, on_bad_clip="skip")  # type: ignore[arg-type]
    loader = loader_for(model, source, settings, decode, arguments.batch_size)
    tell = progress("label", len(source))
    for index, row_D in clip_vectors(model, loader):
        shares, best = best_labels(row_D[None], labels_CD, arguments.top)
        chosen = [
            {"label": labels[place], "probability": share}
            for share, place in zip(shares[0].tolist(), best[0].tolist(), strict=True)
        ]
        print(json.dumps({"id": source.clips[index].id, "path": source.clips[index].path, "labels": chosen}))
        tell(1, 0)
    bad = [clip.clip_id for clip in [*found.bad_clips, *loader.dropped.values()]]
    if bad:
        print(f"bad clips: {len(bad)}: {some(bad)}", file=sys.stderr)
    if len(bad) >= len(found.rows) + len(found.bad_clips):
        raise UserError(f"--source: got {len(bad)} clips, none of them readable; allowed: at least one readable clip")
    return 0
