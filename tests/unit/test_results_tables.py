"""docs/performance.md: its figures are those of benchmarks/results/*.json, and every kind of result has a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.runs import REPOSITORY


@pytest.fixture
def results_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import results_tables

    return results_tables


MACHINE = {"device": "Test CPU", "device_type": "cpu", "threads": 1, "python": "3.11", "versions": {"torch": "2.10.0"}}


def throughput_result() -> dict[str, Any]:
    windows = [{"steps": 2, "clips": 20, "seconds": seconds, "stall_seconds": 0.0} for seconds in (1.0, 2.0, 4.0)]
    stage = {
        "frames": 1,
        "batch_size": 10,
        "attention": "sdpa",
        "cause": "ok",
        "num_devices": 1,
        "modes": {"model": {"windows": windows, "peak_memory_bytes": 2**30}},
        "flops_per_clip": None,
        "peaks": {"datasheet": None, "measured_peak": None},
    }
    return {
        "command": ["python", "benchmarks/throughput.py"],
        "small": False,
        "clips_per_row": 36_000,
        "row_stages": {"1": [[1, 10, 1.0]]},
        "stages": [stage],
    }


SEARCH_ROW = {
    "kind": "hnsw",
    "vectors": 1_000_000,
    "p50_ms": 0.37,
    "p99_ms": 0.8,
    "recall_at_10": 0.98,
    "build_seconds": 148.1,
    "anonymous_bytes": 2**29,
    "file_bytes": 3 * 2**29,
}
EMBED_ROW = {
    "way": "shards bf16",
    "clips_per_second": 1.631,
    "times_released": 3.069,
    "least_cosine_to_released": 0.9992,
}
METRICS = dict.fromkeys(("t2v/R@1", "t2v/R@5", "t2v/MdR", "v2t/R@10"), 1.0)
START_RUNS = [
    {"arm": arm, "seed": 0, "training_minutes": 2.0, "queries": 50, "metrics": {**METRICS, "t2v/R@10": recall}}
    for arm, recall in (("pretrained", 40.0), ("scratch", 25.0))
]
STALL_ROW = {
    "step_seconds": 2.0,
    "stall_seconds": 0.05,
    "stall_over_step": 0.025,
    "stall_share_at_default_interval": 0.00025,
    "peak_memory_bytes": 5 * 2**28,
}


def test_each_file_gives_its_table_with_its_own_figures(results_tables: ModuleType, tmp_path: Path) -> None:
    timing = {"median": 0.5, "p20": 0.4, "p80": 0.6, "windows": 3, "steps_per_window": 1}
    step = {
        "frames": 4,
        "batch": 2,
        "whole": False,
        "size": "base_patch16_224",
        "contender": "sdpa",
        "precision": "fp32",
        "seconds": timing,
        "clips_per_second": 4.0,
        "peak_bytes": 2**20,
    }
    result = {"machine": MACHINE, "command": ["python", "x.py"], "rows": [step]}
    (tmp_path / "step.json").write_text(json.dumps(result))
    (tmp_path / "hours.json").write_text(json.dumps(throughput_result()))
    (tmp_path / "search.json").write_text(json.dumps({"machine": MACHINE, "rows": [SEARCH_ROW]}))
    (tmp_path / "stall.json").write_text(json.dumps({"machine": MACHINE, "rows": {"by a thread": STALL_ROW}}))
    (tmp_path / "embed.json").write_text(json.dumps({"machine": MACHINE, "rows": [EMBED_ROW]}))
    (tmp_path / "start.json").write_text(json.dumps({"machine": MACHINE, "runs": START_RUNS}))
    (tmp_path / "other.json").write_text(json.dumps({"figures": [1, 2]}))
    text = results_tables.tables(tmp_path)
    assert text.index("### hours.json") < text.index("### other.json") < text.index("### step.json")
    assert "0.500 (0.400-0.600)" in text and "Test CPU" in text and "`python x.py`" in text
    assert "| 1 | sdpa | 16.2 | 1 " in text  # 36,000 clips at the median of 10 clips/s are one hour
    assert "| hnsw | 1,000,000 | 0.37 | 0.80 | 0.980 | 148 | 0.50 | 1.50 |" in text
    assert "| by a thread | 2.000 | 0.050 | 2.5 | 0.025 | 1.25 |" in text
    assert "See the file." in text


def test_only_what_stands_between_the_markers_is_rewritten(results_tables: ModuleType) -> None:
    page = f"before {results_tables.BEGIN} old {results_tables.END} after"
    assert results_tables.page_with(page, "new") == (
        f"before {results_tables.BEGIN}\n\nnew\n{results_tables.END} after"
    )
    with pytest.raises(ValueError, match="without"):
        results_tables.page_with("no markers", "new")


def test_the_page_says_what_the_committed_files_say(results_tables: ModuleType) -> None:
    assert results_tables.main(["--check"]) == 0, "run: python benchmarks/results_tables.py"
