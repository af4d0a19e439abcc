"""The report's losses and gradient norms: a plot, a table of the stages, spikes, and steps that were not finite."""

from __future__ import annotations

import statistics
from typing import Any

from frozen_fast.report.document import Block, Bullets, Plot, Section, Table, Text, count, number, percent, significant
from frozen_fast.report.loss_spikes import DEVIATIONS, LEAST_STEPS, WINDOW, loss_spikes
from frozen_fast.report.plots import loss_plot
from frozen_fast.report.run_data import RunData

_MOST_LISTED = 20
_MOST_CLIPS = 4


def loss_section(run: RunData) -> Section | None:
    """Losses of each stage, how often the gradient was clipped, and what was unusual; None before the first step."""
    plot = loss_plot(run)
    if plot is None:
        return None
    largest = float((run.config.get("optimizer") or {}).get("gradient_clip_norm") or 0.0)
    rows = []
    for total in run.totals():
        own = [row for row in run.steps if row["stage"] == total.stage]
        losses = [float(row["loss"]) for row in own if row["loss"] is not None]
        first, last = losses[0] if losses else None, losses[-20:]
        mean = sum(last) / len(last) if last else None
        norms = [float(row["gradient_norm"]) for row in own if row.get("gradient_norm") is not None]
        norm = statistics.median(norms) if norms else None
        clipped = sum(norm > largest for norm in norms) / len(norms) if norms and largest else None
        cells = [number(first, 3), number(mean, 3), significant(norm), percent(clipped)]
        rows.append([str(total.stage + 1), str(total.frames), *cells])
    header = ["Stage", "Frames", "First loss", "Mean of the last 20", "Median gradient norm", "Clipped steps"]
    note = f"clipped: norm above {largest:g}" if largest else "no clipping"
    blocks: list[Block] = [Plot(plot, "Loss of every step (light) and its moving average."), Table(header, rows)]
    blocks.append(Text(f"Gradient norms are those before clipping ({note})."))
    return Section("Loss", [*blocks, *_spikes(run), *_not_finite(run)])


def _spikes(run: RunData) -> list[Block]:
    """A table of loss spikes; empty where there are none."""
    spikes = loss_spikes(run.steps)
    if not spikes:
        return []
    rule = (
        f"{count(len(spikes))} loss spike(s): above the median of the {WINDOW} losses before (of the same source and "
        f"stage, at least {LEAST_STEPS}) by more than {DEVIATIONS} robust standard deviations."
    )
    highest = sorted(sorted(spikes, key=lambda spike: spike.deviations)[-_MOST_LISTED:], key=lambda spike: spike.step)
    rows = [
        [
            count(spike.step),
            str(spike.stage + 1),
            spike.source,
            number(spike.loss, 3),
            number(spike.median, 3),
            number(spike.deviations),
            count(spike.steps),
        ]
        for spike in highest
    ]
    header = ["Step", "Stage", "Source", "Loss", "Median before", "Deviations", "Steps above"]
    return [Text(rule), Table(header, rows)]


def _not_finite(run: RunData) -> list[Block]:
    """The steps of non_finite.jsonl; empty where there are none."""
    if not run.non_finite:
        return []
    skipped = sum(bool(row.get("skipped")) for row in run.steps)
    text = f"Steps whose loss or gradient was NaN or infinite: {count(len(run.non_finite))} ({skipped} skipped)."
    lines = [_describe(row) for row in run.non_finite[:_MOST_LISTED]]
    if len(run.non_finite) > _MOST_LISTED:
        lines.append("the others are in non_finite.jsonl")
    return [Text(text), Bullets(lines)]


def _describe(row: dict[str, Any]) -> str:
    clips = [str(clip) for clip in row.get("clip_ids") or []]
    shown = ", ".join(clips[:_MOST_CLIPS])
    if len(clips) > _MOST_CLIPS:
        shown += f" and {len(clips) - _MOST_CLIPS} more"
    stage = int(row["stage"]) + 1 if isinstance(row.get("stage"), int) else "?"
    values = f"loss {row.get('loss')}, gradient norm {row.get('gradient_norm')}"
    return f"step {row.get('step')}, stage {stage}, source {row.get('source')}: {values}; {row.get('action')}; {shown}"
