"""The report's losses."""

from __future__ import annotations

from frozen_fast.report.document import Plot, Section, Table, number
from frozen_fast.report.plots import loss_plot
from frozen_fast.report.run_data import RunData


def loss_section(run: RunData) -> Section | None:
    """A plot of the losses, and the first and last of each stage; None before the first step."""
    plot = loss_plot(run)
    if plot is None:
        return None
    rows = []
    for total in run.totals():
        losses = [float(row["loss"]) for row in run.steps if row["stage"] == total.stage]
        last = losses[-20:]
        rows.append([str(total.stage + 1), str(total.frames), number(losses[0], 3), number(sum(last) / len(last), 3)])
    table = Table(["Stage", "Frames", "First loss", "Mean of the last 20"], rows)
    return Section("Loss", [Plot(plot, "Loss of every step (light) and its moving average."), table])
