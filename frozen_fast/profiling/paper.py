"""The paper's Table 4, for comparison with training times."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from frozen_fast.errors import unknown_name

HARDWARE_NOTE = "The paper's Table 4 does not state its hardware, so hours are not comparable device by device."
"""Note beside every comparison with the paper's hours."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row: frames as "1=>4", text-to-video on MSR-VTT 1k-A after finetuning, pretraining hours."""

    pretraining_frames: str
    finetuning_frames: int
    recall_at_1: float
    recall_at_10: float
    median_rank: float
    ptt_hours: float


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """Table 4. `clips` is the budget of every row's pretraining; `hardware` is None: not stated."""

    source: str
    hardware: str | None
    clips: int
    rows: tuple[PaperRow, ...]

    def row(self, pretraining_frames: str) -> PaperRow:
        """The row of a curriculum, with the largest number of finetuning frames if there are several.

        Raises:
            UserError: no such row.
        """
        rows = [row for row in self.rows if row.pretraining_frames == pretraining_frames]
        if not rows:
            raise unknown_name("paper_row", pretraining_frames, {row.pretraining_frames for row in self.rows})
        return max(rows, key=lambda row: row.finetuning_frames)

    def hours_per_million_clips(self, frames: int) -> float | None:
        """The paper's own speed at a constant number of frames; None if no row has it."""
        for row in self.rows:
            if row.pretraining_frames == str(frames):
                return row.ptt_hours / self.clips * 1e6
        return None


@cache
def table_4() -> PaperTable:
    """Read the table from the package's data."""
    text = resources.files("frozen_fast.profiling").joinpath("paper_table4.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    rows = tuple(PaperRow(**row) for row in values.pop("rows"))
    return PaperTable(rows=rows, **values)
