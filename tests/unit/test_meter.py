"""The stage meter on a made-up clock and device: where time goes, what resumes, what a GPU's queue changes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from frozen_fast.profiling import DevicePeak, StageMeter
from frozen_fast.profiling.flops import TrainingFlops
from frozen_fast.profiling.memory import peak_memory_bytes, reset_peak_memory


class Clock:
    """Host time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


class QueueDevice:
    """A device with its own time line: work queues behind what runs already."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.free_at, self.syncs = clock, clock.now, 0

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.clock.now) + seconds

    def mark(self) -> float:
        return max(self.free_at, self.clock.now)

    def seconds_between(self, first: float, second: float) -> float:
        return second - first

    def synchronize(self) -> None:
        self.syncs += 1
        self.clock.now = max(self.clock.now, self.free_at)


def build(clock: Clock, **options: Any) -> StageMeter:
    return StageMeter(stage=1, frames=4, batch_sizes={"clips": 8}, clock=clock, **options)


def run_step(meter: StageMeter, clock: Clock, stall: float, compute: float, *, warmup: bool = False) -> None:
    with meter.step(warmup=warmup) as step:
        with step.stall():
            clock.pass_seconds(stall)
        step.count(8, 4, TrainingFlops(2e9, 3e9))
        clock.pass_seconds(compute)


def run_stage(meter: StageMeter, clock: Clock) -> None:
    run_step(meter, clock, 3.0, 5.0, warmup=True)
    clock.pass_seconds(0.25)  # other
    for _ in range(4):
        run_step(meter, clock, 0.5, 1.5)
    with meter.section("evaluation"):
        clock.pass_seconds(7.0)
    with meter.section("checkpoint"):
        clock.pass_seconds(2.0)


def test_every_part_gets_its_seconds() -> None:
    clock = Clock()
    meter = build(clock, num_devices=2)
    run_stage(meter, clock)
    row = meter.stage_row()
    parts = {
        name: row[f"{name}_seconds"] for name in ("training", "stall", "warmup", "evaluation", "checkpoint", "other")
    }
    expected = {"training": 6.0, "stall": 2.0, "warmup": 8.0, "evaluation": 7.0, "checkpoint": 2.0, "other": 0.25}
    assert parts == pytest.approx(expected)
    assert row["seconds"] == pytest.approx(sum(expected.values()))
    assert row["gpu_hours"] == pytest.approx((6 + 2 + 8 + 2) * 2 / 3600)
    assert row["evaluation_gpu_hours"] == pytest.approx(7 * 2 / 3600)
    assert (row["steps"], row["clips"], row["video_frames"]) == (5, 40, 160)
    assert row["clips_per_second"] == pytest.approx(32 / 8.0)
    assert row["stall_share"] == pytest.approx(0.25)


def test_the_parts_of_a_real_clock_add_up_to_the_wall_time() -> None:
    meter = StageMeter(stage=0, frames=1, batch_sizes={})
    for _ in range(3):
        with meter.step() as step:
            with step.stall():
                sum(range(20_000))
            step.count(1, 1)
            sum(range(50_000))
    with meter.section("evaluation"):
        sum(range(50_000))
    row = meter.stage_row()
    named = [row[f"{part}_seconds"] for part in ("training", "stall", "warmup", "evaluation", "checkpoint", "other")]
    assert min(named[0], named[1], named[3]) > 0
    assert sum(named) == pytest.approx(row["seconds"], rel=0.01)


def test_step_rows_add_up_to_the_stage() -> None:
    clock = Clock()
    meter = build(clock)
    run_stage(meter, clock)
    rows = meter.end_window()
    assert meter.end_window() == []
    stage = meter.stage_row()
    timed = [row for row in rows if not row.warmup]
    assert sum(row.clips for row in rows) == stage["clips"]
    assert sum(row.stall_seconds for row in timed) == pytest.approx(stage["stall_seconds"])
    assert sum(row.seconds - row.stall_seconds for row in timed) == pytest.approx(stage["training_seconds"])
    assert sum(row.seconds for row in rows if row.warmup) == pytest.approx(stage["warmup_seconds"])


def test_a_resumed_stage_equals_one_in_a_single_piece() -> None:
    whole_clock, clock = Clock(), Clock()
    whole = build(whole_clock)
    run_stage(whole, whole_clock)
    run_stage(whole, whole_clock)
    first = build(clock)
    run_stage(first, clock)
    state = json.loads(json.dumps(first.state_dict()))
    clock.pass_seconds(500.0)  # the time between two runs is nobody's
    second = build(clock, state=state)
    run_stage(second, clock)
    expected, got = whole.stage_row(), second.stage_row()
    for row in (expected, got):
        row.pop("peak_memory_bytes")
        assert row.pop("batch_sizes") == {"clips": 8}
    assert got == pytest.approx(expected)


def test_gpu_hours_of_a_resume_on_other_devices_are_those_used() -> None:
    clock = Clock()
    first = build(clock, num_devices=8)
    run_step(first, clock, 0.0, 10.0)
    second = build(clock, num_devices=1, state=first.state_dict())
    run_step(second, clock, 0.0, 10.0)
    assert second.stage_row()["gpu_hours"] == pytest.approx((8 * 10 + 10) / 3600)


def test_mfu_is_model_flops_over_the_named_peak() -> None:
    clock = Clock()
    meter = build(clock, num_devices=2)
    run_stage(meter, clock)
    peak = DevicePeak(device="x", dtype="bf16", flops_per_second=1e10, bytes_per_second=None, source="a test")
    measured = replace(peak, flops_per_second=8e9, source="a product")
    row = meter.stage_row(peak=peak, measured_peak=measured, recompilations=3)
    # 32 clips of 2 GFLOP executed in 8 s of training and stall on two devices.
    assert row["mfu_datasheet"] == pytest.approx(32 * 2e9 / 8.0 / 2 / 1e10)
    assert row["mfu_measured_peak"] == pytest.approx(32 * 2e9 / 8.0 / 2 / 8e9)
    assert (row["flops_per_clip"], row["nominal_flops_per_clip"]) == (pytest.approx(2e9), pytest.approx(3e9))
    assert (row["peak_source"], row["measured_peak_source"], row["recompilations"]) == ("a test", "a product", 3)
    bare = meter.stage_row()
    assert all(bare[key] is None for key in ("mfu_datasheet", "mfu_measured_peak", "peak_source"))


def test_a_meter_carries_both_counts_of_flops_on() -> None:
    clock = Clock()
    first = build(clock)
    run_step(first, clock, 0.0, 1.0)
    second = build(clock, state=json.loads(json.dumps(first.state_dict())))
    run_step(second, clock, 0.0, 1.0)
    assert second.stage_row()["nominal_flops_per_clip"] == pytest.approx(3e9)
    older = build(clock, state={**first.state_dict(), "flops": 16e9})
    assert older.stage_row()["flops_per_clip"] is None, "a checkpoint of an older version tells one number only"


def test_unknown_flops_make_the_stage_unknown() -> None:
    clock = Clock()
    meter = build(clock)
    with meter.step() as step:
        step.count(4, 1, flops_per_clip=None)
        step.count(4, 1, TrainingFlops(1e9, 1e9))
        clock.pass_seconds(1.0)
    run_step(meter, clock, 0.0, 1.0)
    peak = DevicePeak(device="x", dtype="bf16", flops_per_second=1e10, bytes_per_second=None, source="a test")
    row = meter.stage_row(peak=peak)
    assert row["flops_per_clip"] is None and row["mfu_datasheet"] is None


def test_a_stage_without_timed_steps_claims_no_speed() -> None:
    clock = Clock()
    meter = build(clock)
    run_step(meter, clock, 0.0, 1.0, warmup=True)
    row = meter.stage_row()
    assert row["clips_per_second"] is None and row["stall_share"] is None and row["mfu_datasheet"] is None
    assert row["clips"] == 8


def test_a_step_that_raises_is_not_counted() -> None:
    clock = Clock()
    meter = build(clock)
    with pytest.raises(KeyboardInterrupt), meter.step() as step:
        step.count(8, 4)
        clock.pass_seconds(3.0)
        raise KeyboardInterrupt
    row = meter.stage_row()
    assert (row["steps"], row["clips"], row["other_seconds"]) == (0, 0, pytest.approx(3.0))


def test_waiting_for_a_batch_while_the_device_works_is_no_stall() -> None:
    clock = Clock()
    device = QueueDevice(clock)
    meter = build(clock, timer=device)
    synced = device.syncs
    for wait in (1.0, 4.0, 15.0):
        with meter.step() as step:
            with step.stall():
                clock.pass_seconds(wait)
            step.count(8, 4)
            device.launch(10.0)
            clock.pass_seconds(0.5)  # the host only launches
    assert device.syncs == synced, "a step must not synchronise"
    rows = meter.end_window()
    # The first batch is awaited by an idle device. The second comes while the first step runs. The third is awaited
    # from 6.0 to 21.0 on the host, but the device has work until 1 + 10 + 10 = 21.
    assert [row.stall_seconds for row in rows] == pytest.approx([1.0, 0.0, 0.0])
    stage = meter.stage_row()
    assert stage["stall_seconds"] == pytest.approx(1.0)
    assert stage["training_seconds"] == pytest.approx(30.0)
    assert stage["seconds"] == pytest.approx(31.0)


def test_a_stall_behind_a_queue_is_the_time_the_device_was_idle() -> None:
    clock = Clock()
    device = QueueDevice(clock)
    meter = build(clock, timer=device)
    for wait in (0.0, 9.0):
        with meter.step() as step:
            with step.stall():
                clock.pass_seconds(wait)
            step.count(8, 4)
            device.launch(6.0)
    rows = meter.end_window()
    assert [row.stall_seconds for row in rows] == pytest.approx([0.0, 3.0])
    assert sum(row.seconds for row in rows) == pytest.approx(15.0)


def test_queued_work_is_not_charged_to_evaluation() -> None:
    clock = Clock()
    device = QueueDevice(clock)
    meter = build(clock, timer=device)
    with meter.step() as step:
        step.count(8, 4)
        device.launch(10.0)
    with meter.section("evaluation"):
        device.launch(4.0)
    row = meter.stage_row()
    assert (row["training_seconds"], row["evaluation_seconds"]) == (pytest.approx(10.0), pytest.approx(4.0))


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(ValueError, match="section: got 'training'; allowed: evaluation, checkpoint, warmup"):
        with build(Clock()).section("training"):
            pass


def test_peak_memory_of_a_cpu_sees_a_large_tensor() -> None:
    cpu = torch.device("cpu")
    resettable = reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory_bytes(cpu) >= before + (tensor.nbytes // 2 if resettable else 0)


def test_a_ranks_own_times_leave_out_warm_up_and_waits_for_others() -> None:
    clock = Clock()
    meter = build(clock)
    for warmup in (True, False, False):
        with meter.step(warmup=warmup) as step:
            with step.stall():
                with step.reading():
                    clock.pass_seconds(0.5)
                clock.pass_seconds(2.0)  # the other ranks' loaders
            with step.forward():
                clock.pass_seconds(0.25)
            clock.pass_seconds(4.0)  # their passes
    assert meter.rank_row() == {"steps": 2, "reading_seconds": 1.0, "forward_seconds": 0.5}


def test_forward_passes_are_timed_on_the_devices_time_line() -> None:
    clock = Clock()
    device = QueueDevice(clock)
    meter = build(clock, timer=device)
    with meter.step() as step:
        for _ in range(2):
            with step.forward():
                device.launch(0.75)
            device.launch(3.0)
    assert meter.rank_row()["forward_seconds"] == pytest.approx(1.5)
