"""The report's comparison with the paper's Table 4."""

from __future__ import annotations

from frozen_fast.report.document import Block, Bullets, Section, Table, Text, count, number, significant
from frozen_fast.report.paper_comparison import compare_with_paper
from frozen_fast.report.run_data import RunData


def paper_section(run: RunData) -> Section | None:
    """The run's hours and the paper's; None for a config without paper_row."""
    comparison = compare_with_paper(run)
    if comparison is None:
        return None
    row, hours = comparison.row, comparison.comparable_hours
    if comparison.covers:
        kind = "measured"
    else:
        kind = "projection" if hours is not None else "no projection: a stage has no speed yet"
    header = ["", "What", "Clips", "Hours", "R@1 after finetuning", "R@10", "MedR"]
    paper = [
        f"Paper, Table 4, {row.pretraining_frames} frames",
        "PTT, hardware not stated",
        count(comparison.paper_clips),
    ]
    paper += [number(row.ptt_hours), number(row.recall_at_1), number(row.recall_at_10), number(row.median_rank)]
    rows = [paper]
    if not comparison.covers:
        own = significant(comparison.measured_gpu_hours)
        rows.append(["This run", "measured, not comparable", count(comparison.clips), own, "", "", ""])
    label = "This run" if comparison.covers else "This run, at the paper's clips"
    clips = comparison.clips if comparison.covers else comparison.paper_clips
    rows.append([label, kind, count(clips), significant(hours), "", "", ""])
    blocks: list[Block] = [Table(header, rows, words=2)]
    if hours and comparison.same_model:
        what = "hours" if comparison.covers else "projected hours"
        blocks.append(Text(f"The paper's PTT is {significant(row.ptt_hours / hours)} x this run's {what}."))
    return Section("Comparison with the paper", [*blocks, Bullets(comparison.notes)])
