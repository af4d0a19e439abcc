"""Several runs of one experiment that differ in their seed: mean and standard deviation of the retrieval numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.evaluation.published import published_row
from frozen_fast.report.document import Bullets, Document, Section, Table, number
from frozen_fast.report.run_data import RunData

SHOWN = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "Geom")


def chosen_rows(run: RunData) -> list[dict[str, Any]]:
    """The evaluations of a run's best checkpoint, where one is kept as the best, else those of its last step."""
    steps = [row["step"] for row in run.evaluations]
    step = run.best_step if run.best_step in steps else (steps[-1] if steps else None)
    return [row for row in run.evaluations if row["step"] == step]


def seeds_summary(runs: Mapping[int, RunData]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds.

    Args:
        runs: seed -> run.

    Returns:
        One row per source and protocol: {"source", "protocol", "seeds", "mean", "deviation"}, the last two by metric;
        the deviation is that of a sample (divided by the number of seeds less one), 0 for one seed.
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
                "seeds": sorted(metrics),
                "mean": {name: statistics.fmean(found) for name, found in values.items()},
                "deviation": {
                    name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()
                },
            }
        )
    return summary


def seeds_document(name: str, runs: Mapping[int, RunData], paper: Mapping[str, Any]) -> Document:
    """The summary as a report, with the row of the paper that the experiment follows."""
    metrics = [f"{direction}/{metric}" for direction in ("t2v", "v2t") for metric in SHOWN]
    rows: list[Sequence[str]] = []
    if paper.get("table"):
        printed = published_row(str(paper["table"]), str(paper["row"]))
        cells = [number(printed.numbers.get(metric)) for metric in metrics]
        rows.append([f"{printed.source}, {printed.name}", printed.protocol, "", *cells])
    for row in seeds_summary(runs):
        cells = [
            f"{number(row['mean'][metric])} ({number(row['deviation'][metric])})" if metric in row["mean"] else "n/a"
            for metric in metrics
        ]
        rows.append([row["source"], row["protocol"], ", ".join(map(str, row["seeds"])), *cells])
    table = Table(["Set", "Protocol", "Seeds", *metrics], rows, words=3)
    notes = Bullets(
        [
            "Mean over the seeds, and in parentheses the standard deviation of the sample.",
            "Each run counts with its best checkpoint, where the config keeps one, else with its last evaluation.",
        ]
    )
    subtitle = f"seeds {', '.join(map(str, sorted(runs)))}"
    return Document(f"{name}: {len(runs)} seeds", subtitle, sections=[Section("Retrieval", [table, notes])])


def seed_folder(run_folder: Path, seed: int) -> Path:
    """Where the run of a seed lies."""
    return run_folder / f"seed_{seed}"
