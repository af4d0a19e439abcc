"""Comparison of a run with the paper's Table 4: measured and projected hours, and differences."""

from __future__ import annotations

from dataclasses import dataclass

from frozen_fast.profiling import HARDWARE_NOTE, PaperRow, table_4
from frozen_fast.report.run_data import RunData, StageTotals

# A run that saw this share of the paper's clips counts as one epoch.
WHOLE_EPOCH = 0.98
PAPER_MODEL = "base_patch16_224"


@dataclass(frozen=True)
class PaperComparison:
    """The paper's row and the comparable numbers of this run.

    Attributes:
        row: Table 4's row.
        paper_clips: the budget of its pretraining.
        clips: of this run.
        covers: whether this run saw as many.
        measured_gpu_hours: of this run, with warm-up and checkpoints; None if a stage has none.
        projected_gpu_hours: this run's speeds after warm-up, applied to the paper's clips with this run's shares;
            None where a stage of the curriculum has no speed yet.
        same_model: whether the video tower has the paper's size.
        notes: differences that affect the comparison.
    """

    row: PaperRow
    paper_clips: int
    clips: int
    covers: bool
    measured_gpu_hours: float | None
    projected_gpu_hours: float | None
    same_model: bool
    notes: list[str]

    @property
    def comparable_hours(self) -> float | None:
        """Hours comparable with PTT: measured if the run covers the epoch, otherwise projected."""
        return self.measured_gpu_hours if self.covers else self.projected_gpu_hours


def compare_with_paper(run: RunData) -> PaperComparison | None:
    """The comparison for a run whose config names a row; None for others, or before the first step."""
    name = str(run.config.get("paper_row") or "none")
    totals = run.totals()
    if name == "none" or not totals:
        return None
    table = table_4()
    row = table.row(name)
    clips = sum(total.clips for total in totals)
    hours = [(run.stage_row(total.stage) or {}).get("gpu_hours") for total in totals]
    covers = clips >= WHOLE_EPOCH * table.clips and run.status.get("state") == "done"
    return PaperComparison(
        row=row,
        paper_clips=table.clips,
        clips=clips,
        covers=covers,
        measured_gpu_hours=None if None in hours else sum(hour for hour in hours if hour is not None),
        projected_gpu_hours=_projection(run, totals, clips, table.clips),
        same_model=run.video_size == PAPER_MODEL,
        notes=_notes(run, totals, name, clips, table.clips, covers),
    )


def _projection(run: RunData, totals: list[StageTotals], clips: int, paper_clips: int) -> float | None:
    planned = (run.config.get("curriculum") or {}).get("stages") or ()
    if len(totals) < max(1, len(planned)) or not clips:
        return None
    hours = 0.0
    for total in totals:
        if not total.clips_per_second:
            return None
        stage = run.stage_row(total.stage) or {}
        devices = stage.get("num_devices") or run.environment.get("world_size") or 1
        hours += total.clips / clips * paper_clips / total.clips_per_second * devices / 3600
    return hours


def _notes(run: RunData, totals: list[StageTotals], name: str, clips: int, paper_clips: int, covers: bool) -> list[str]:
    notes = [HARDWARE_NOTE]
    if not covers:
        notes.append(
            f"This run saw {clips:,} clips, {100 * clips / paper_clips:.2g} % of the paper's {paper_clips / 1e6:g} "
            "million, so its own hours are not comparable. The projection applies its measured clips/s after warm-up "
            "to that many clips, with this run's share of clips per stage; warm-up, checkpoints and evaluation are "
            "left out."
        )
    size = run.video_size
    if size != PAPER_MODEL:
        notes.append(f"The video tower is {size}, the paper's is {PAPER_MODEL}: the times are of a different model.")
    frames = "=>".join(str(total.frames) for total in totals)
    if frames != name:
        notes.append(f"The stages so far have {frames} frames, the row {name}.")
    if not run.on_gpu:
        notes.append("This run computed on CPUs: its hours are wall time x processes, not GPU-hours.")
    return notes
