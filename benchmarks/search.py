"""Search latency, recall and memory over synthetic vectors, and clips embedded per second.

    python benchmarks/search.py --vectors 1000000 --kinds flat,hnsw --output results/search_1m.json
    python benchmarks/search.py --vectors 10000000 --dtype float16 --kinds ivfpq
    python benchmarks/search.py --vectors 20000 --embed CHECKPOINT FOLDER

Vectors are drawn around random centres of a low-dimensional subspace, as embeddings of clips are: neighbours mean
something, and no query is a stored vector. Each kind answers the same queries one at a time; recall@10 is the share of
exact search's results. Latency is the time of one query's vector, without the text tower. Peak memory is the process's
largest resident set, which counts pages of memory-mapped files while they are in memory. --embed times
frozen_fast.search.embed_videos over a folder's clips, after a first pass over one batch.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measure import percentile, pick_device, write_result

from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.search import Index, embed_videos
from frozen_fast.search.collection import folder_clips
from frozen_fast.search.index_folder import IndexFolder, IndexInfo
from frozen_fast.search.neighbours import BLOCK_ROWS, KINDS, recall_of
from frozen_fast.search.row_table import SCHEMA

SUBSPACE = 48
CENTRES = 2000
SPREAD = 0.6
K = 10


def main() -> int:
    """Measure and write a result file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000, help="stored vectors (default 100000)")
    parser.add_argument("--width", type=int, default=256, help="width of a vector (default 256)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored vectors")
    parser.add_argument("--kinds", default="flat,hnsw", help="of flat, hnsw, ivfpq (default flat,hnsw)")
    parser.add_argument("--queries", type=int, default=200, help="queries, one at a time (default 200)")
    parser.add_argument("--embed", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="time embed_videos too")
    parser.add_argument("--device", default="auto", help="for --embed: auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("search.json"), help="result file (default search.json)")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    device = pick_device(options.device)
    try:
        if not set(kinds) <= set(KINDS) or options.vectors < 1000 or options.queries < 1:
            raise UserError(f"--kinds, --vectors, --queries: allowed: of {', '.join(KINDS)}; from 1000; from 1")
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure_kinds(Path(scratch), options.vectors, options.width, options.dtype, kinds, options.queries)
        result: dict[str, Any] = {"rows": rows}
        if options.embed:
            result["embedding"] = measure_embedding(*options.embed, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_result(options.output, device, vars(options), result)
    for row in rows:
        latency = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms"
        print(f"{row['kind']:>6}: {latency}, recall@10 {row['recall_at_10']:.3f}")
    print(options.output)
    return 0


def synthetic(count: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors [n, D] in blocks; the centres are the same for every seed."""
    fixed = np.random.default_rng(0)
    centres = fixed.standard_normal((CENTRES, SUBSPACE)).astype(np.float32)
    basis = fixed.standard_normal((SUBSPACE, width)).astype(np.float32)
    rng = np.random.default_rng(seed)
    for first in range(0, count, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, count - first)
        inner = centres[rng.integers(0, CENTRES, rows)] + SPREAD * rng.standard_normal((rows, SUBSPACE), np.float32)
        vectors = inner @ basis
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def synthetic_table(count: int) -> pa.Table:
    """Rows of an index without files."""
    numbers = pa.array(np.arange(count)).cast(pa.string())
    same = {"kind": "video", "file_digest": "0", "file_bytes": 0, "file_mtime_ns": 0}
    columns: dict[str, Any] = {"id": numbers, "path": numbers}
    columns |= {name: pa.array(list(itertools.repeat(value, count))) for name, value in same.items()}
    columns |= {name: pa.nulls(count) for name in ("start_seconds", "end_seconds", "caption")}
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)


def measure_kinds(
    folder: Path, count: int, width: int, dtype: str, kinds: list[str], num_queries: int
) -> list[dict[str, Any]]:
    """A row per kind: latency, recall against exact search, build time, file and memory sizes."""
    settings = {"frames": 1, "stride_seconds": 0.0, "max_windows": 0, "resize": 256}
    info = IndexInfo(width=width, dtype=dtype, checkpoint="", fingerprint="", settings=settings)
    IndexFolder.create(folder, info).append(synthetic_table(count), synthetic(count, width, seed=1))
    queries = next(synthetic(num_queries, width, seed=2))
    index = Index(folder)
    exact = index.search(queries, K)[1]
    rows = []
    for kind in kinds:
        begin = time.perf_counter()
        about = index.build(kind)
        build_seconds = time.perf_counter() - begin
        opened = Index(folder)
        opened.search(queries[:5], K)
        seconds, found = [], []
        for query in queries:
            begin = time.perf_counter()
            found.append(opened.search(query[None], K)[1][0])
            seconds.append(time.perf_counter() - begin)
        rows.append(
            {
                "kind": kind,
                "vectors": count,
                "p50_ms": 1e3 * percentile(seconds, 0.5),
                "p99_ms": 1e3 * percentile(seconds, 0.99),
                "queries": num_queries,
                "recall_at_10": recall_of(np.stack(found), exact),
                "effort": about.get("effort"),
                "build_seconds": build_seconds,
                "index_bytes": about.get("bytes", 0),
                "vector_bytes": sum(path.stat().st_size for path in folder.glob("segment-*.npy")),
                "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
    return rows


def measure_embedding(checkpoint: str, folder: str, device: torch.device) -> dict[str, Any]:
    """Clips per second of embed_videos over a folder."""
    model = DualEncoder.from_pretrained(checkpoint).to(device)
    clips = list(folder_clips(Path(folder)))
    embed_videos(model, clips[:32], windows="middle")
    begin = time.perf_counter()
    embed_videos(model, clips, windows="middle")
    seconds = time.perf_counter() - begin
    rate = len(clips) / seconds
    return {"clips": len(clips), "frames": model.learned_frames, "seconds": seconds, "clips_per_second": rate}


if __name__ == "__main__":
    sys.exit(main())
