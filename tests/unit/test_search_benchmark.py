"""benchmarks/search.py at a tiny size: every kind gives a row, and exact search recalls everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import REPOSITORY, environment


@pytest.mark.slow
def test_a_row_per_kind(tmp_path: Path) -> None:
    output = tmp_path / "search.json"
    command = [
        sys.executable,
        "benchmarks/search.py",
        "--vectors",
        "2000",
        "--width",
        "32",
        "--kinds",
        "flat,hnsw",
        "--queries",
        "20",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    flat, hnsw = json.loads(output.read_text())["rows"]
    assert (flat["kind"], flat["recall_at_10"], hnsw["kind"]) == ("flat", 1.0, "hnsw")
    assert hnsw["recall_at_10"] >= 0.9 and 0 < hnsw["p50_ms"] <= hnsw["p99_ms"]
    assert hnsw["index_bytes"] > 0 and flat["vector_bytes"] == hnsw["vector_bytes"]
    assert all(row["anonymous_bytes"] > 0 and row["file_bytes"] > 0 for row in (flat, hnsw))
