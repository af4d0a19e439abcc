"""The attention benchmark: its arithmetic, its table, and a whole run at toy sizes."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/attention.py, whose siblings it finds beside itself."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("attention")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def measure(benchmark):
    return importlib.import_module("measure")


def case(benchmark, axis="time", frames=4):
    return benchmark.Case(axis, frames, batch=2, patches=9, heads=3, head_width=8, dtype="bf16")


def test_least_bytes_are_twelve_rows_of_a_training_step(benchmark):
    """The project's floor: 12 reads and writes of width D per token, 4 of them forward."""
    one = case(benchmark)
    elements = 2 * (1 + 4 * 9) * 24
    assert benchmark.least_bytes(one, backward=False) == 4 * elements * 2
    assert benchmark.least_bytes(one, backward=True) == 12 * elements * 2


@pytest.mark.parametrize(("axis", "keys"), [("time", 4 + 1), ("space", 9 + 1)])
def test_least_flops_count_the_pairs(benchmark, axis, keys):
    pairs = 36 * keys + 37
    assert benchmark.least_flops(case(benchmark, axis), backward=False) == 2 * 2 * pairs * 2 * 24
    assert benchmark.least_flops(case(benchmark, axis), backward=True) == 3 * 2 * 2 * pairs * 2 * 24


def test_the_floor_is_the_larger_limit(benchmark):
    one = case(benchmark)
    peak = {"bytes_per_second": 1.0, "flops_per_second": 1e30}
    assert benchmark.floor_seconds(one, peak, backward=False) == (benchmark.least_bytes(one, backward=False), "memory")
    peak = {"bytes_per_second": 1e30, "flops_per_second": 1.0}
    assert benchmark.floor_seconds(one, peak, backward=True) == (benchmark.least_flops(one, backward=True), "compute")


def test_percentiles(measure):
    timing = measure.summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median, timing.p20, timing.p80) == (3.0, pytest.approx(1.8), pytest.approx(4.2))


def test_steps_take_turns(measure):
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings, failed = measure.time_in_turns(steps, torch.device("cpu"), windows=3, window_seconds=0.0, warmup=1)
    assert not failed
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {timing.windows for timing in timings.values()} == {3}


class CompilationError(Exception):
    """As Triton's: neither a RuntimeError nor a ValueError."""


@pytest.mark.parametrize("good_runs", [0, 1, 4])
def test_a_step_that_fails_does_not_stop_the_others(measure, good_runs):
    runs = []

    def fails():
        runs.append(1)
        if len(runs) > good_runs:
            raise CompilationError("at 12:3:\n  cannot")

    steps = {"bad": fails, "good": lambda: None}
    timings, failed = measure.time_in_turns(steps, torch.device("cpu"), windows=5, window_seconds=0.0, warmup=1)
    assert set(timings) == {"good"} and timings["good"].windows == 5
    assert failed == {"bad": "CompilationError: at 12:3:"} and len(runs) == good_runs + 1


def test_peak_memory_of_a_step(measure):
    """Two tensors held at once, then one: the peak is both."""

    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second.sum()

    assert 8000 <= measure.peak_step_bytes(step, torch.device("cpu")) < 12_000


def test_a_run_writes_result_table_and_plot(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measured_peak", lambda device, dtype: PEAK)
    monkeypatch.setattr(benchmark, "time_in_turns", partial(benchmark.time_in_turns, windows=2, window_seconds=0.0))
    arguments = ["--device", "cpu", "--frames", "1=2,3=1", "--patches", "4", "--heads", "2", "--head-width", "4"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "attention.json").read_text())
    assert {row["backend"] for row in result["rows"]} == {"reference", "sdpa", "cpu_c"}
    assert len(result["rows"]) == 2 * 2 * 2 * 3 and all(row["times_floor"] > 0 for row in result["rows"])
    reference = [row for row in result["rows"] if row["backend"] == "reference"]
    assert all(row["speedup_over_reference"] == 1.0 for row in reference)
    assert "not representative of a GPU" in result["note"] and result["machine"]["device_type"] == "cpu"
    assert set(result["left_out"]["fp32"]) == {"xformers", "triton"}
    assert "not representative of a GPU" in (tmp_path / "attention.md").read_text()
    assert (tmp_path / "attention.svg").stat().st_size > 1000
    assert "left out in fp32: xformers" in capsys.readouterr().out


PEAK = {"bytes_per_second": 1e10, "flops_per_second": 1e11, "source": "made up for a test"}


def failing_attention(qkv, frames, axis, backend):
    if backend == "sdpa":
        raise CompilationError("no kernel\nfor this")
    return qkv.sum(dim=(2,)).flatten(2)


def test_a_failing_backend_has_a_row_with_its_reason(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "divided_attention", failing_attention)
    one = benchmark.Case("time", 1, 1, 2, 1, 4, "fp32")
    rows = benchmark.measure_case(one, ["sdpa", "cpu_c"], torch.device("cpu"), PEAK)
    found = [(row["direction"], row["backend"], row.get("failed")) for row in rows]
    assert found == [
        (direction, backend, reason)
        for direction in ("forward", "forward+backward")
        for backend, reason in (("sdpa", "CompilationError: no kernel"), ("cpu_c", None))
    ]
    assert "failed: CompilationError: no kernel" in benchmark.table(rows, torch.device("cpu"), {"fp32": PEAK})


def test_what_was_measured_is_written_after_every_case(benchmark, tmp_path, monkeypatch):
    """A run that is ended at its third case leaves the first two."""
    monkeypatch.setattr(benchmark, "measured_peak", lambda device, dtype: PEAK)
    monkeypatch.setattr(benchmark, "time_in_turns", partial(benchmark.time_in_turns, windows=1, window_seconds=0.0))
    measure_case, cases = benchmark.measure_case, []

    def ended(case, *rest):
        cases.append(case)
        if len(cases) == 3:
            raise KeyboardInterrupt
        return measure_case(case, *rest)

    monkeypatch.setattr(benchmark, "measure_case", ended)
    arguments = ["--device", "cpu", "--frames", "1=2,3=1", "--patches", "4", "--heads", "2", "--head-width", "4"]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*arguments, "--backends", "sdpa", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {(row["axis"], row["frames"]) for row in rows} == {("time", 1), ("time", 3)}
    assert (tmp_path / "attention.md").read_text().count("| time |") == 4
