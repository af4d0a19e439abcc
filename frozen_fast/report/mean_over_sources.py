"""The mean over evaluation sources that are folds or splits of one benchmark (evaluation.average_sources)."""

from __future__ import annotations

from typing import Any

from frozen_fast.report.document import Section, Table, Text, number
from frozen_fast.report.run_data import RunData


def mean_over_sources_section(run: RunData) -> Section | None:
    """The mean of every metric over the sources of the last evaluation; None without evaluation.average_sources."""
    if not (run.config.get("evaluation") or {}).get("average_sources") or not run.evaluations:
        return None
    last = [row for row in run.evaluations if row["step"] == run.evaluations[-1]["step"]]
    rows = []
    for protocol in dict.fromkeys(row["protocol"] for row in last):
        own = [row for row in last if row["protocol"] == protocol]
        for metric in _numbers(own[0]):
            values = [_numbers(row)[metric] for row in own if metric in _numbers(row)]
            spread = f"{number(min(values))} to {number(max(values))}"
            rows.append([protocol, metric, str(len(values)), number(sum(values) / len(values)), spread])
    sources = ", ".join(dict.fromkeys(row["source"] for row in last))
    text = Text(f"Mean over {sources}, after step {last[0]['step']:,}.")
    header = ["Protocol", "Metric", "Sets", "Mean", "Smallest to largest"]
    return Section("Mean over sets", [text, Table(header, rows, words=2)])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """An evaluation's metrics, including classification if its source has classes."""
    numbers = dict(row["metrics"])
    for kind in ("classification", "linear_head"):
        found = row.get(kind) or {}
        names = [name for name in ("top1", "top5", "mean_class_accuracy") if name in found]
        numbers |= {f"{kind}/{name}": found[name] for name in names}
    return numbers
