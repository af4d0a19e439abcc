"""The meter, the peak and the memory on a real CUDA device."""

from __future__ import annotations

import time

import pytest
import torch

from frozen_fast.losses import contrastive_loss, gathered_contrastive_loss
from frozen_fast.profiling import StageMeter, device_peak, measure_peak, peak_memory_bytes, reset_peak_memory

pytestmark = pytest.mark.gpu


def busy(seconds: float) -> None:
    """Queue work of about this length on the device; returns at once."""
    torch.cuda._sleep(int(seconds * 1e9))  # clock cycles, at one to two GHz


def test_a_wait_behind_queued_work_is_no_stall_and_a_wait_of_an_idle_device_is() -> None:
    device = torch.device("cuda")
    meter = StageMeter(stage=0, frames=1, batch_sizes={}, device=device)
    for wait in (0.0, 0.05, 0.0):
        with meter.step() as step:
            with step.stall():
                time.sleep(wait)
            step.count(1, 1)
            busy(0.4)
    hidden = meter.end_window()
    assert hidden[1].stall_seconds < 0.01
    with meter.step() as step:
        with step.stall():
            time.sleep(0.1)
        step.count(1, 1)
        busy(0.01)
    (idle,) = meter.end_window()
    assert idle.stall_seconds == pytest.approx(0.1, abs=0.03)
    row = meter.stage_row()
    parts = ("training", "stall", "warmup", "evaluation", "checkpoint", "other")
    assert sum(row[f"{part}_seconds"] for part in parts) == pytest.approx(row["seconds"], rel=0.01)
    assert row["training_seconds"] > 0.4


def test_measured_peak_lies_below_the_datasheets() -> None:
    measured = measure_peak("cuda", "bf16", size=4096)
    assert measured.flops_per_second > 1e12 and measured.bytes_per_second is not None
    sheet = device_peak(torch.cuda.get_device_name(), "bf16")
    if sheet is not None:
        assert measured.flops_per_second < 1.05 * sheet.flops_per_second
        assert sheet.bytes_per_second is not None and measured.bytes_per_second < 1.05 * sheet.bytes_per_second


def test_peak_memory_sees_a_tensor_that_is_gone() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    tensor = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    del tensor
    assert peak_memory_bytes(device) >= before + (256 << 20)


@pytest.mark.parametrize("chunk_rows", [0, 33])
def test_loss_under_autocast_equals_the_cpus_in_double(chunk_rows: int) -> None:
    video, text = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = contrastive_loss(video, text)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, value = gathered_contrastive_loss(video.float().cuda(), text.float().cuda(), chunk_rows=chunk_rows)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and value.item() == loss.item()


def test_chunks_bound_the_memory_of_the_logits() -> None:
    rows = 8192
    peaks = {}
    for chunk_rows in (0, 256):
        video, text = (torch.randn(rows, 64, device="cuda", requires_grad=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        gathered_contrastive_loss(video, text, chunk_rows=chunk_rows)[0].backward()
        peaks[chunk_rows] = torch.cuda.max_memory_allocated() - base
    assert peaks[0] > 2 * rows * rows * 4
    assert peaks[256] < rows * rows * 4 / 4
