"""The mean over evaluation sources that are folds or splits of one benchmark (evaluation.average_sources)."""

from __future__ import annotations

from frozen_fast.evaluation.spread import spread_over
from frozen_fast.report.document import Section, Table, Text, number
from frozen_fast.report.run_data import RunData


def mean_over_sources_section(run: RunData) -> Section | None:
    """The mean of every metric over the sources of the last evaluation; None without evaluation.average_sources."""
    if not (run.config.get("evaluation") or {}).get("average_sources") or not run.evaluations:
        return None
    last = [row for row in run.evaluations if row["step"] == run.evaluations[-1]["step"]]
    rows = []
    for group in spread_over(last, ("protocol",)):
        for metric, found in group["metrics"].items():
            mean, deviation = number(found["mean"]), number(found["deviation"])
            spread = f"{number(found['smallest'])} to {number(found['largest'])}"
            rows.append([group["protocol"], metric, str(found["count"]), mean, deviation, spread])
    sources = ", ".join(dict.fromkeys(row["source"] for row in last))
    text = Text(f"Mean and standard deviation of the sample over {sources}, after step {last[0]['step']:,}.")
    header = ["Protocol", "Metric", "Sets", "Mean", "Deviation", "Smallest to largest"]
    return Section("Mean over sets", [text, Table(header, rows, words=2)])
