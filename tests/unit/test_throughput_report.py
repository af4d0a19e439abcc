"""The report of benchmarks/throughput.py: a smoke run states speeds, and no hours."""

from __future__ import annotations

from types import ModuleType

import pytest

from support.runs import REPOSITORY


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import throughput_report

    return throughput_report


def result_of(small: bool) -> dict[str, object]:
    """One stage of the row "1" at 100 clips/s on one device."""
    mode = {"windows": [{"steps": 1, "clips": 100, "seconds": 1.0, "stall_seconds": 0.0}]}
    stage = {"frames": 1, "attention": "sdpa", "cause": "ok", "num_devices": 1, "modes": {"end_to_end": mode}}
    stages = [{**stage, "batch_size": 8, "global_batch_size": 8, "compile": False, "flops_per_clip": None}]
    return {"small": small, "row_stages": {"1": [[1, 8, 1.0]]}, "stages": stages, "clips_per_row": 2_500_000}


def test_mfu_is_told_against_both_peaks(report: ModuleType) -> None:
    (stage,) = result_of(small=False)["stages"]  # type: ignore[misc]
    peaks = {"datasheet": {"flops_per_second": 1e12, "source": "a table"}, "measured_peak": None}
    stage = {**stage, "flops_per_clip": 1e9, "peaks": peaks}
    assert report.mfu(stage, "end_to_end", "datasheet") == pytest.approx(100 * 1e9 / 1e12)
    assert report.mfu(stage, "end_to_end", "measured_peak") is None


def test_a_smoke_run_projects_no_hours(report: ModuleType) -> None:
    assert report.projected_rows(result_of(small=True)) == []
    small = {**result_of(small=True), "command": ["x"], "stages": [], "paper_hardware": "not stated"}
    assert not any("GPU-hours" in line for line in report.heading(small))
    assert any("SMALL" in line for line in report.heading(small))
    assert any("GPU-hours are projections" in line for line in report.heading({**small, "small": False}))
