"""Mean and standard deviation over runs of one experiment with different seeds or splits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.evaluation.classification import ACCURACIES
from frozen_fast.evaluation.published import published_row
from frozen_fast.report.document import Bullets, Document, Section, Table, number
from frozen_fast.report.run_data import RunData

SHOWN = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "Geom")


def chosen_rows(run: RunData) -> list[dict[str, Any]]:
    """The evaluations of a run's best checkpoint, or of its last step if it keeps none."""
    steps = [row["step"] for row in run.evaluations]
    step = run.best_step if run.best_step in steps else (steps[-1] if steps else None)
    return [row for row in run.evaluations if row["step"] == step]


def runs_summary(runs: Mapping[int, RunData], of: str = "seed") -> list[dict[str, Any]]:
    """Mean and deviation over runs.

    Args:
        runs: seed (or number of the split) -> run.
        of: what differs between the runs, "seed" or "split".

    Returns:
        One row per source and protocol: {"source", "protocol", "seeds" (or "splits"), "mean", "deviation"}, the last
        two by metric; the deviation is that of a sample (divided by the number of runs less one), 0 for one run.
    """
    by_set: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for seed, run in runs.items():
        for row in chosen_rows(run):
            by_set.setdefault((row["source"], row["protocol"]), {})[seed] = row["metrics"]
    summary = []
    for (source, protocol), metrics in by_set.items():
        names = set.intersection(*(set(one) for one in metrics.values()))
        values = {name: [one[name] for one in metrics.values()] for name in sorted(names)}
        summary.append(
            {
                "source": source,
                "protocol": protocol,
                f"{of}s": sorted(metrics),
                "mean": {name: statistics.fmean(found) for name, found in values.items()},
                "deviation": {
                    name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()
                },
            }
        )
    return summary


def runs_document(name: str, runs: Mapping[int, RunData], paper: Mapping[str, Any], of: str = "seed") -> Document:
    """The summary as a report, with the row of the paper that the experiment follows."""
    classifies = any(run.is_classifier() for run in runs.values())
    metrics = [f"{direction}/{metric}" for direction in ("t2v", "v2t") for metric in SHOWN]
    metrics = list(ACCURACIES) if classifies else metrics
    rows: list[Sequence[str]] = []
    if paper.get("table"):
        printed = published_row(str(paper["table"]), str(paper["row"]))
        cells = [number(printed.numbers.get(metric)) for metric in metrics]
        rows.append([f"{printed.source}, {printed.name}", printed.protocol, "", *cells])
    for row in runs_summary(runs, of):
        cells = [
            f"{number(row['mean'][metric])} ({number(row['deviation'][metric])})" if metric in row["mean"] else "n/a"
            for metric in metrics
        ]
        rows.append([row["source"], row["protocol"], ", ".join(map(str, row[f"{of}s"])), *cells])
    table = Table(["Set", "Protocol", f"{of.capitalize()}s", *metrics], rows, words=3)
    notes = Bullets(
        [
            f"Mean over the {of}s, and in parentheses the standard deviation of the sample.",
            "Each run is represented by its best checkpoint if the config keeps one, otherwise by its last evaluation.",
        ]
    )
    subtitle = f"{of}s {', '.join(map(str, sorted(runs)))}"
    title = "Action recognition" if classifies else "Retrieval"
    return Document(f"{name}: {len(runs)} {of}s", subtitle, sections=[Section(title, [table, notes])])


def folder_of_run(run_folder: Path, number: int, of: str = "seed") -> Path:
    """Where the run of a seed or a split lies."""
    return run_folder / f"{of}_{number}"
