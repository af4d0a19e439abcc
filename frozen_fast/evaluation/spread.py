"""Mean and spread of an evaluation's numbers over sources or splits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from frozen_fast.evaluation.classification import ACCURACIES


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an entry of metrics.json, with the accuracies of `classification` and `linear_head` if present."""
    numbers = dict(row["metrics"])
    for kind in ("classification", "linear_head"):
        found = row.get(kind) or {}
        numbers |= {f"{kind}/{name}": found[name] for name in ACCURACIES if name in found}
    return numbers


def spread_over(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and spread of every metric over rows that agree in some keys.

    Args:
        rows: entries as in metrics.json.
        keys: such as ("protocol",), which summarises over sources.

    Returns:
        One entry per combination of values of the keys, in the order of the rows: the keys, and "metrics": metric ->
        {"count", "mean", "deviation", "smallest", "largest"}. The deviation is that of a sample (divided by the count
        less one), 0 for one row. "count" is the number of rows that have the metric.
    """
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        values = groups.setdefault(tuple(row[key] for key in keys), {})
        for name, value in numbers_of(row).items():
            values.setdefault(name, []).append(value)
    return [
        {**dict(zip(keys, group, strict=True)), "metrics": {name: _spread(found) for name, found in values.items()}}
        for group, values in groups.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "smallest": min(values),
        "largest": max(values),
    }
