"""The benchmarks of search and of embedding at a tiny size."""

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


@pytest.mark.slow
def test_ways_to_embed_give_the_same_vectors(tmp_path: Path) -> None:
    """The plain loop of the released code, files and shards: one row each, close to one another."""
    pytest.importorskip("cv2", reason="needs the extra search")
    output = tmp_path / "embed_speed.json"
    command = [sys.executable, "benchmarks/embed_speed.py", "--small", "--clips", "4", "--frames", "2"]
    command += ["--size", "pico_patch16_32", "--batch-size", "2", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["way"]: row for row in json.loads(output.read_text())["rows"]}
    assert {"released fp32", "files fp32", "shards fp32"} <= set(rows)
    assert rows["released fp32"]["times_released"] == 1
    assert all(row["clips_per_second"] > 0 and row["least_cosine_to_released"] > 0.99 for row in rows.values())
