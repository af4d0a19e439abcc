"""Table 4 as printed."""

from __future__ import annotations

import pytest

from frozen_fast.errors import UserError
from frozen_fast.profiling import table_4


@pytest.mark.parametrize(
    ("frames", "finetuning", "recall_1", "recall_10", "median", "hours"),
    [
        ("1", 1, 18.8, 56.6, 7.0, 16.2),
        ("1", 4, 24.9, 67.1, 5.0, 16.2),
        ("4", 4, 26.0, 64.9, 5.0, 45.6),
        ("1=>4", 4, 26.6, 65.5, 5.0, 22.1),
        ("8", 8, 25.4, 67.3, 4.0, 98.0),
        ("1=>4=>8", 8, 27.4, 67.3, 4.0, 36.0),
    ],
)
def test_rows_are_those_printed(
    frames: str, finetuning: int, recall_1: float, recall_10: float, median: float, hours: float
) -> None:
    table = table_4()
    rows = [r for r in table.rows if (r.pretraining_frames, r.finetuning_frames) == (frames, finetuning)]
    assert len(rows) == 1 and len(table.rows) == 6
    row = rows[0]
    assert (row.recall_at_1, row.recall_at_10, row.median_rank, row.ptt_hours) == (recall_1, recall_10, median, hours)


def test_a_row_is_found_by_its_curriculum() -> None:
    table = table_4()
    assert table.row("1=>4=>8").ptt_hours == 36.0
    assert table.row("1").finetuning_frames == 4
    assert table.hardware is None
    with pytest.raises(UserError, match=r"paper_row: got '1=>8'"):
        table.row("1=>8")


def test_the_papers_own_speeds_explain_its_two_stage_row() -> None:
    """80 % of the clips at one frame and 20 % at four, at the speeds of the constant rows, take 22.1 hours."""
    table = table_4()
    one, four = table.hours_per_million_clips(1), table.hours_per_million_clips(4)
    assert one is not None and four is not None
    assert table.clips / 1e6 * (0.8 * one + 0.2 * four) == pytest.approx(table.row("1=>4").ptt_hours, abs=0.05)
    assert table.hours_per_million_clips(2) is None
