"""Search latency, recall and memory over synthetic vectors.

    python benchmarks/search.py --vectors 1000000 --kinds flat,hnsw --output results/search_1m_cpu.json
    python benchmarks/search.py --vectors 10000000 --dtype float16 --kinds ivfpq --output results/search_10m_cpu.json

Vectors are drawn around random centres of a low-dimensional subspace, as embeddings of clips are: neighbours mean
something, and no query is a stored vector. They are generated in blocks and never all in memory. Each kind is built
(its search effort is chosen with other queries), then a fresh process opens the index and answers the same queries one
at a time; recall@10 is the share of exact search's results. Latency is the time of one query's vector, without the text
tower. Of the fresh process's memory, anonymous bytes are its own; file bytes are pages of memory-mapped files, which
the system frees when it needs them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measure import percentile, write_result

from frozen_fast.errors import UserError
from frozen_fast.search import Index
from frozen_fast.search.index_folder import IndexFolder, IndexInfo
from frozen_fast.search.neighbours import BLOCK_ROWS, KINDS, recall_of
from frozen_fast.search.row_table import SCHEMA

SUBSPACE = 48
CENTRES = 2000
SPREAD = 0.6
K = 10
WARM_UP = 5


def main() -> int:
    """Measure and write a result file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000, help="stored vectors (default 100000)")
    parser.add_argument("--width", type=int, default=256, help="width of a vector (default 256)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="dtype of the stored vectors"
    )
    parser.add_argument("--kinds", default="flat,hnsw", help="of flat, hnsw, ivfpq (default flat,hnsw)")
    parser.add_argument("--queries", type=int, default=200, help="queries, one at a time (default 200)")
    parser.add_argument("--output", type=Path, default=Path("search.json"), help="result file (default search.json)")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    device = torch.device("cpu")
    try:
        if not set(kinds) <= set(KINDS) or options.vectors < 1000 or options.queries < 1:
            raise UserError(f"--kinds, --vectors, --queries: allowed: of {', '.join(KINDS)}; from 1000; from 1")
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure_kinds(Path(scratch), options.vectors, options.width, options.dtype, kinds, options.queries)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_result(options.output, device, vars(options), {"rows": rows})
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
    columns |= {name: pa.repeat(value, count) for name, value in same.items()}
    columns |= {name: pa.nulls(count) for name in ("start_seconds", "end_seconds", "caption")}
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)


def measure_kinds(
    folder: Path, count: int, width: int, dtype: str, kinds: list[str], num_queries: int
) -> list[dict[str, Any]]:
    """A row per kind: latency, recall against exact search, build time, file and memory sizes."""
    settings = {"frames": 1, "stride_seconds": 0.0, "max_windows": 0, "resize": 256}
    info = IndexInfo(width=width, dtype=dtype, checkpoint="", fingerprint="", settings=settings)
    IndexFolder.create(folder, info).append(synthetic_table(count), synthetic(count, width, seed=1))
    queries, others = (next(synthetic(num_queries, width, seed=seed)) for seed in (2, 3))
    index = Index(folder)
    exact = index.search(queries, K)[1]
    rows = []
    for kind in kinds:
        begin = time.perf_counter()
        about = index.build(kind, others)
        build_seconds = time.perf_counter() - begin
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found, seconds, memory = fresh.submit(answer, folder, queries).result()
        rows.append(
            {
                "kind": kind,
                "vectors": count,
                "p50_ms": 1e3 * percentile(seconds, 0.5),
                "p99_ms": 1e3 * percentile(seconds, 0.99),
                "queries": num_queries,
                "recall_at_10": recall_of(found, exact),
                "effort": about.get("effort"),
                "build_seconds": build_seconds,
                "index_bytes": about.get("bytes", 0),
                "vector_bytes": sum(path.stat().st_size for path in folder.glob("segment-*.npy")),
                **memory,
            }
        )
        print(describe(rows[-1]), flush=True)
    return rows


def answer(folder: Path, queries_QD: np.ndarray) -> tuple[np.ndarray, list[float], dict[str, int]]:
    """Open an index and ask it one query at a time.

    Returns:
        (rows found [Q, K], seconds of each query, the process's memory).
    """
    index = Index(folder)
    index.search(queries_QD[:WARM_UP], K)
    seconds, found = [], []
    for query_D in queries_QD:
        begin = time.perf_counter()
        found.append(index.search(query_D[None], K)[1][0])
        seconds.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    memory = {"anonymous_bytes": "RssAnon", "file_bytes": "RssFile"}
    return np.stack(found), seconds, {name: 1024 * int(sizes[key].split()[0]) for name, key in memory.items()}


def describe(row: dict[str, Any]) -> str:
    """A row in words."""
    latency = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms"
    memory = f"{row['anonymous_bytes'] / 2**30:.2f} GiB and {row['file_bytes'] / 2**30:.2f} GiB of mapped files"
    return f"{row['kind']:>6}: {latency}, recall@10 {row['recall_at_10']:.3f}, {memory}, {row['build_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
