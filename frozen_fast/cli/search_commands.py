"""`frozen-fast embed`, `search` and `index`: build, search and maintain an index."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozen_fast.common.progress import progress
from frozen_fast.errors import UserError, some

if TYPE_CHECKING:
    from frozen_fast.search import Hit, Index

CAPTION_CHARACTERS = 60


def embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `embed`."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="folder, released file or ORG/NAME")
    parser.add_argument(
        "--source", required=True, metavar="PATH", help="folder of videos and images, manifest, or packed shards"
    )
    parser.add_argument(
        "--output", required=True, metavar="INDEX", help="folder of the index; an existing one is updated"
    )
    parser.add_argument(
        "--format", default="auto", help="format of the source: auto, folder, or a format of data.sources"
    )
    parser.add_argument("--split", default="", help="split, for formats with splits (default: all)")
    parser.add_argument("--frames", type=positive, metavar="T", help="frames per window (default: the checkpoint's)")
    parser.add_argument(
        "--windows",
        type=_windows,
        default="auto",
        metavar="auto|middle|N",
        help="auto: the run's test windows; middle: one; N: at most N per clip",
    )
    parser.add_argument(
        "--stride-seconds", type=float, metavar="S", help="seconds between windows (default: the run's)"
    )
    parser.add_argument(
        "--span",
        action="append",
        default=[],
        metavar="10s|scenes",
        help="divide videos into spans of this length, or at scene changes; with both, long scenes are divided",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="type of the stored vectors")
    parser.add_argument(
        "--kind",
        default="auto",
        metavar="auto|flat|hnsw|ivfpq",
        help="kind of neighbour search (auto: by the number of rows)",
    )
    parser.add_argument("--model-kind", metavar="KIND", help="kind of a released file: frozen (default) or clip2video")
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer, for a released file (which has none)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="windows per forward pass")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="loader processes (0: a background thread)"
    )
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="decoding threads of a loader")
    parser.add_argument("--decoder", metavar="NAME", help="auto, dali, torchcodec, decord or pyav (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--fresh", action="store_true", help="remove an existing index first")
    form.add_argument("--add", action="store_true", help="keep the index's rows of files that the source does not have")
    parser.add_argument(
        "--ray", metavar="local|ADDRESS", help="embed in tasks of a Ray cluster (local: a new one here)"
    )
    parser.add_argument("--ray-workers", type=positive, default=2, metavar="N", help="number of tasks (default 2)")


def embed(arguments: argparse.Namespace) -> int:
    """Embed a source into an index; existing vectors are kept."""
    if arguments.stride_seconds is not None and not arguments.stride_seconds >= 0:
        raise UserError(f"--stride-seconds: got {arguments.stride_seconds}; allowed: from 0")
    from frozen_fast.models.hub import checkpoint_path
    from frozen_fast.search import check_packages

    check_packages()
    from frozen_fast.search.embed_run import EmbedRequest, embed_to_index

    span_seconds, scenes = _spans(arguments.span)
    request = EmbedRequest(
        checkpoint=checkpoint_path(arguments.checkpoint),
        source=arguments.source,
        output=Path(arguments.output),
        format=arguments.format,
        split=arguments.split,
        frames=arguments.frames,
        windows=arguments.windows,
        stride_seconds=arguments.stride_seconds,
        span_seconds=span_seconds,
        scenes=scenes,
        dtype=arguments.dtype,
        kind=arguments.kind,
        model_kind=arguments.model_kind,
        tokenizer=arguments.tokenizer,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        threads=arguments.threads,
        decoder=arguments.decoder,
        device=arguments.device,
        fresh=arguments.fresh,
        add=arguments.add,
    )
    first_rank = os.environ.get("RANK", "0") == "0"

    def tell(total: int) -> Callable[[int, int], None]:
        return progress("embed", total) if first_rank and total else lambda done, bad: None

    if arguments.ray is None:
        summary, neighbours = embed_to_index(request, tell)
    else:
        from frozen_fast.search.embed_ray import embed_on_ray

        summary, neighbours = embed_on_ray(request, tell, address=arguments.ray, workers=arguments.ray_workers)
    if first_rank:
        print(
            f"{arguments.output}: {summary.rows} clips ({summary.embedded} embedded, {summary.reused} kept, "
            f"{summary.removed} removed, {len(summary.bad_clips)} bad); {describe_neighbours(neighbours)}"
        )
        if summary.bad_clips:
            names = some([clip.clip_id for clip in summary.bad_clips])
            print(
                f"bad clips: {names}; {Path(arguments.output) / 'bad_clips.jsonl'} gives the reasons", file=sys.stderr
            )
    return 0


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `search`."""
    parser.add_argument("text", nargs="?", help="description of the clips to find")
    parser.add_argument("--index", required=True, metavar="INDEX", help="folder that `frozen-fast embed` wrote")
    parser.add_argument("--like", metavar="FILE", help="search by this video or picture instead of a text")
    parser.add_argument("-k", type=positive, default=10, metavar="K", help="results (default 10)")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="COLUMN=VALUE, also != < <= > >= and ~ (contains); columns: id path kind start_seconds end_seconds "
        "caption; may be given several times",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument("--html", metavar="FILE", help="write a page with a frame of each result")
    parser.add_argument("--checkpoint", metavar="PATH", help="path of the model, if it was moved")
    parser.add_argument("--device", default="cpu", help="device of the model (default cpu)")


def search(arguments: argparse.Namespace) -> int:
    """Print the clips that match a text or a file best."""
    if (arguments.text is None) == (arguments.like is None):
        raise UserError("text, --like: got " + ("both" if arguments.text else "neither") + "; allowed: one of them")
    from frozen_fast.search import Index

    index = Index(arguments.index, checkpoint=arguments.checkpoint, device=arguments.device)
    if arguments.like is not None:
        hits = index.search_like(arguments.like, arguments.k, arguments.where)
    else:
        hits = index.search_text(arguments.text, arguments.k, arguments.where)
    warn_of_changed_files(index, hits)
    if arguments.json:
        print(json.dumps([hit.to_json() for hit in hits], indent=2, ensure_ascii=False))
    elif arguments.html is not None:
        from frozen_fast.search.result_page import write_result_page

        print(write_result_page(Path(arguments.html), arguments.text or f"like {arguments.like}", hits))
    else:
        print_hits(hits)
    return 0


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `index`."""
    parser.add_argument("index", metavar="INDEX", help="folder that `frozen-fast embed` wrote")
    parser.add_argument("--build", metavar="auto|flat|hnsw|ivfpq", help="rebuild the neighbour search")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ID", help="remove clips")
    parser.add_argument("--compact", action="store_true", help="free the disk space of removed clips")
    parser.add_argument("--check-files", action="store_true", help="list files that were moved or changed")


def index(arguments: argparse.Namespace) -> int:
    """Describe an index, and change it."""
    from frozen_fast.search import Index

    opened = Index(arguments.index)
    if arguments.remove:
        opened.remove(arguments.remove)
    if arguments.compact:
        opened.compact()
    if arguments.build or (arguments.compact and not opened.neighbours_fit()):
        opened.build(arguments.build or "auto")
    facts = opened.facts()
    if arguments.check_files:
        facts["changed_files"] = opened.changed_files()
    print(json.dumps(facts, indent=2))
    return 0


def describe_neighbours(about: dict[str, Any]) -> str:
    """Describe the neighbour search."""
    if about["kind"] == "flat":
        return "exact search"
    return f"{about['kind']} with recall@10 {about['recall_at_10']:.3f} over {about['recall_queries']} queries"


def warn_of_changed_files(index: Index, hits: Sequence[Hit]) -> None:
    """Warn of results whose file has changed since it was embedded."""
    for path, state in index.changed_files([hit.row for hit in hits]).items():
        print(
            f"warning: {path} is {state} since it was embedded; `frozen-fast embed` updates the index",
            file=sys.stderr,
        )


def print_hits(hits: Sequence[Hit]) -> None:
    """Results as a table."""
    print(f"{'rank':>4} {'score':>7} {'seconds':>15}  path")
    for hit in hits:
        caption = f"  {hit.caption[:CAPTION_CHARACTERS]}" if hit.caption else ""
        print(f"{hit.rank:>4} {hit.score:>7.4f} {times(hit):>15}  {hit.path}{caption}")


def times(hit: Hit) -> str:
    """Time range of a result in its file."""
    if hit.start_seconds is None and hit.end_seconds is None:
        return "-"
    end = "end" if hit.end_seconds is None else f"{hit.end_seconds:g}"
    return f"{hit.start_seconds or 0:g}-{end}"


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number, 1 or more")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number, 0 or more")
    return int(text)


def _windows(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _spans(wanted: Sequence[str]) -> tuple[float | None, bool]:
    """(length of a span in seconds or None, whether scenes are cut)."""
    lengths = [text for text in wanted if text != "scenes"]
    try:
        seconds = [float(text.removesuffix("s")) for text in lengths]
    except ValueError:
        seconds = []
    if len(seconds) != len(lengths) or len(seconds) > 1:
        raise UserError(f"--span: got {' '.join(lengths)}; allowed: seconds, such as 10s, or scenes, or both")
    return (seconds[0] if seconds else None), "scenes" in wanted
