"""The report's comparison with a published row (paper.table, paper.row)."""

from __future__ import annotations

from typing import Any

from frozen_fast.evaluation.published import PublishedRow, published_row
from frozen_fast.report.document import Block, Bullets, Section, Table, number
from frozen_fast.report.run_data import RunData

PAPER_MODEL = "base_patch16_224"


def published_section(run: RunData) -> Section | None:
    """The published numbers and those of the last evaluation; None for a config without paper.table.

    Re-ranked numbers are in a separate section.
    """
    paper: dict[str, Any] = run.config.get("paper") or {}
    if not paper.get("table"):
        return None
    row = published_row(str(paper["table"]), str(paper.get("row")))
    header = ["", "Set", "Protocol", "Frames", *row.numbers]
    frames = "not stated" if row.frames is None else str(row.frames)
    rows = [[f"{row.source}, {row.table}, {row.name}", row.about, row.protocol, frames]]
    rows[0] += [number(value) for value in row.numbers.values()]
    ours = _comparable(run, row)
    for evaluation in ours:
        cells = [f"This run, step {evaluation['step']:,}", evaluation["source"], evaluation["protocol"]]
        cells.append(str(evaluation["frames"]))
        rows.append(cells + [number(evaluation["metrics"].get(name)) for name in row.numbers])
    blocks: list[Block] = [Table(header, rows, words=3), Bullets(_notes(run, row, ours))]
    return Section("Retrieval compared with the paper", blocks)


def _comparable(run: RunData, row: PublishedRow) -> list[dict[str, Any]]:
    """The best checkpoint's evaluations, else the last ones: of the paper's protocol where there are any."""
    rows = run.stage_evaluations()
    chosen = [entry for entry in rows if entry["step"] == run.best_step]
    if not chosen and rows:
        chosen = [entry for entry in rows if entry["step"] == rows[-1]["step"]]
    return [entry for entry in chosen if entry["protocol"] == row.protocol] or chosen


def _notes(run: RunData, row: PublishedRow, ours: list[dict[str, Any]]) -> list[str]:
    notes = ["R@k in percent; the paper's numbers are copied from its table; this run's are measured."]
    if not ours:
        notes.append("No evaluation of this run has finished.")
    other = sorted({entry["protocol"] for entry in ours} - {row.protocol})
    if other:
        notes.append(f"Protocol of this run: {', '.join(other)}; that of the paper's numbers: {row.protocol}.")
    frames = sorted({entry["frames"] for entry in ours})
    if row.frames is not None and frames and frames != [row.frames]:
        shown = ", ".join(map(str, frames))
        notes.append(f"Frames per window in this run: {shown}; the paper's model has {row.frames}.")
    size = run.video_size
    if row.source == "Frozen in Time" and not row.table.startswith("Table A.2") and size != PAPER_MODEL:
        notes.append(f"The video tower is {size}, the paper's is {PAPER_MODEL}.")
    return notes
