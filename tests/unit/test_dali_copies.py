"""Copies out of DALI's buffers on a GPU, with streams and a pipeline that stand in for the real ones.

A copy that was started happens when its event is waited for, as late as it may on a GPU; DALI's next run overwrites its
buffers, as the real one does.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from frozen_fast.data.decode import dali_pipeline
from frozen_fast.data.decode.dali_pipeline import CopyStream, GraphKind, run_pipeline


class FakeEvent:
    def __init__(self, work: list[Callable[[], object]]) -> None:
        self.work = work

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


class FakeStream:
    def __init__(self, device: object = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.calls: list[tuple[str, object]] = []

    def wait_stream(self, other: object) -> None:
        self.calls.append(("wait_stream", other))

    def wait_event(self, event: object) -> None:
        self.calls.append(("wait_event", event))

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.work)


class Output:
    """A tensor of DALI's."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def shape(self) -> list[int]:
        return list(self.values.shape)


class Peaks(list[np.ndarray]):
    def as_cpu(self) -> Peaks:
        return self

    def at(self, number: int) -> np.ndarray:
        return self[number]


class FakePipeline:
    """Its run number fills the buffers, which are always the same."""

    def __init__(self) -> None:
        self.buffers = np.zeros((2, 1, 3, 2, 2), dtype=np.float32)
        self.runs = 0

    def feed_input(self, name: str, values: object) -> None:
        pass

    def run(self) -> tuple[list[Output], Peaks]:
        self.runs += 1
        self.buffers[:] = self.runs
        return [Output(buffer) for buffer in self.buffers], Peaks([np.array([255])] * 2)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The caller's stream."""

    def feed_ndarray(output: Output, target: torch.Tensor, cuda_stream: FakeStream) -> None:
        cuda_stream.work.append(lambda: target.copy_(torch.from_numpy(output.values)))

    plugin: Any = types.ModuleType("nvidia.dali.plugin.pytorch")
    plugin.feed_ndarray = feed_ndarray
    monkeypatch.setitem(sys.modules, "nvidia.dali.plugin.pytorch", plugin)
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def run(pipeline: FakePipeline, copies: CopyStream) -> list[torch.Tensor]:
    device = torch.device("cpu")  # where the stand-in's tensors are
    inputs: Any = dict.fromkeys(dali_pipeline._INPUTS, [0, 0])
    return run_pipeline(pipeline, GraphKind("image", False), device, copies, **inputs)[0]


def test_the_next_run_waits_for_the_copies(compute: FakeStream) -> None:
    pipeline, copies = FakePipeline(), CopyStream(torch.device("cpu"))
    first, second = run(pipeline, copies), run(pipeline, copies)
    copies.wait()
    assert all((clip == 1).all() for clip in first) and all((clip == 2).all() for clip in second)


def test_without_the_wait_the_first_clips_would_be_overwritten(
    compute: FakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins are able to show the fault."""
    pipeline, copies = FakePipeline(), CopyStream(torch.device("cpu"))
    wait = CopyStream.wait
    monkeypatch.setattr(CopyStream, "wait", lambda self: None)
    first, _ = run(pipeline, copies), run(pipeline, copies)
    wait(copies)
    assert all((clip == 2).all() for clip in first)


def test_streams_are_ordered_both_ways(compute: FakeStream) -> None:
    """The copies start after what the caller has queued, and what it queues later starts after the copies."""
    copies = CopyStream(torch.device("cpu"))
    run(FakePipeline(), copies)
    assert copies._stream.calls == [("wait_stream", compute)]  # type: ignore[attr-defined]
    assert [name for name, _ in compute.calls] == ["wait_event"]
