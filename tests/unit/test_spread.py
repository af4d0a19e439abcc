"""Mean and spread over sources and splits, against numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest

from frozen_fast.evaluation.spread import spread_over


def row(source: str, protocol: str, top1: float, **metrics: float) -> dict[str, Any]:
    found = {"top1": top1, "top5": 90.0, "mean_class_accuracy": 5.0, "clips": 7, "confusion": [[7]]}
    return {"source": source, "protocol": protocol, "metrics": metrics, "classification": found}


def test_rows_that_agree_in_the_keys_are_one_entry() -> None:
    rows = [
        row("one", "plain", 10.0, **{"t2v/R@1": 1.0}),
        row("two", "plain", 20.0, **{"t2v/R@1": 2.0, "twin_accuracy": 50.0}),
        row("one", "paragraph", 90.0, **{"t2v/R@1": 9.0}),
        row("six", "plain", 60.0, **{"t2v/R@1": 6.0}),
    ]
    plain, paragraph = spread_over(rows, ("protocol",))
    assert (plain["protocol"], paragraph["protocol"]) == ("plain", "paragraph")
    recall = {"count": 3, "mean": 3.0, "deviation": pytest.approx(7**0.5), "smallest": 1.0, "largest": 6.0}
    assert plain["metrics"]["t2v/R@1"] == recall, "((1-3)**2 + (2-3)**2 + (6-3)**2) / 2 = 7"
    assert plain["metrics"]["classification/top1"]["mean"] == 30.0
    assert plain["metrics"]["twin_accuracy"]["count"] == 1 and plain["metrics"]["twin_accuracy"]["deviation"] == 0.0
    assert "classification/clips" not in plain["metrics"]
    assert paragraph["metrics"]["t2v/R@1"]["mean"] == 9.0
    entries = spread_over(rows, ("source", "protocol"))
    assert [(entry["source"], entry["protocol"]) for entry in entries] == [
        ("one", "plain"),
        ("two", "plain"),
        ("one", "paragraph"),
        ("six", "plain"),
    ]
