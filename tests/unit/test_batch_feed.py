"""The agreement of ranks on a batch: begun while the pass before it computes, ended where the batch is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from frozen_fast.config import config_from_mapping
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.training.batch_feed import BatchFeed, StepGivenUp

CONFIG = config_from_mapping({"data": {"sources": [{"name": "s", "path": "s"}]}})
PLAN = SimpleNamespace(
    index=0, steps=2, accumulation=2, frames=1, batch_sizes={"s": 2}, source_frames={"s": 1}, epoch_steps=2
)


class Ranks:
    """Two ranks of which this is the first; the other one says what `other` holds."""

    rank, is_main = 0, False

    def __init__(self, told: list[str], world_size: int = 2) -> None:
        self.told, self.world_size = told, world_size
        self.other = {"stop": False, "without": 0}

    def begin_agreement(
        self, error: Exception | None, *, stop: bool, counts: Sequence[int]
    ) -> Callable[[], tuple[bool, list[int]]]:
        self.told.append("begin")
        other = dict(self.other)

        def end() -> tuple[bool, list[int]]:
            self.told.append("end")
            if error is not None:
                raise error
            bad, without, save = counts
            return stop or bool(other["stop"]), [bad, without + int(other["without"]), save]

        return end


def feed_of(told: list[str], ranks: Ranks, batches: int = 4) -> tuple[BatchFeed, SimpleNamespace]:
    def read(specs: Iterator[Any]) -> Iterator[Any]:
        for number, spec in enumerate(specs):
            if number == batches:
                return
            told.append(f"read {number}")
            yield SimpleNamespace(source="s", spec=spec, clip_ids=["a"], bad_clips=[], backends=Counter())

    parts = SimpleNamespace(sources={"s": [0] * 8}, teachers=None, roll_backs=0, loader=SimpleNamespace(batches=read))
    stop = SimpleNamespace(asked=False, take_save_request=lambda: False)
    return BatchFeed(CONFIG, ranks, None, parts, stop, None, lambda: False), stop  # type: ignore[arg-type]


def test_the_next_pass_is_agreed_on_while_this_one_computes() -> None:
    told: list[str] = []
    feed, stop = feed_of(told, Ranks(told))
    batches = feed.batches(PLAN, 0)  # type: ignore[arg-type]
    for number in range(4):
        feed.next_batch(batches, StepTime())
        told.append(f"pass {number}")
        feed.read_ahead(batches, StepTime())
    expected = ["read 0", "begin", "end", "pass 0"]
    for number in (1, 2, 3):
        expected += [f"read {number}", "begin", "end", f"pass {number}"]
    assert told == expected, "nothing is read past the stage's last pass"


def test_a_stop_counts_at_the_next_agreement_and_then_nothing_is_read_ahead() -> None:
    told: list[str] = []
    ranks = Ranks(told)
    feed, stop = feed_of(told, ranks)
    batches = feed.batches(PLAN, 0)  # type: ignore[arg-type]
    feed.next_batch(batches, StepTime())
    feed.read_ahead(batches, StepTime())
    ranks.other["stop"] = True  # after this rank has begun the agreement on pass 1
    feed.next_batch(batches, StepTime())
    assert not feed.stopped
    feed.read_ahead(batches, StepTime())
    feed.next_batch(batches, StepTime())
    assert feed.stopped
    before = list(told)
    feed.read_ahead(batches, StepTime())
    assert told == before
    feed.next_batch(batches, StepTime())  # the step's other passes still have their batches
    assert told[-3:] == ["read 3", "begin", "end"]


def test_a_checkpoint_answers_the_requests_made_before_it() -> None:
    told: list[str] = []
    asked = iter([True, True, False, True])
    feed, stop = feed_of(told, Ranks(told))
    stop.take_save_request = lambda: next(asked)
    batches = feed.batches(PLAN, 0)  # type: ignore[arg-type]
    wanted = []
    for _ in range(4):
        feed.next_batch(batches, StepTime())
        wanted.append(feed.save_wanted)
        feed.read_ahead(batches, StepTime())
        if feed.save_wanted:
            feed.checkpoint_saved()
    assert wanted == [True, False, False, True], "the second request came before the first checkpoint"


def test_an_error_and_a_missing_batch_are_raised_at_their_own_pass() -> None:
    told: list[str] = []
    ranks = Ranks(told)
    feed, _ = feed_of(told, ranks, batches=1)
    batches = feed.batches(PLAN, 0)  # type: ignore[arg-type]
    feed.next_batch(batches, StepTime())
    feed.read_ahead(batches, StepTime())  # the loader ends here
    with pytest.raises(RuntimeError, match="the loader ended before the stage did"):
        feed.next_batch(batches, StepTime())
    ranks.other["without"] = 1
    feed, _ = feed_of(told, ranks)
    with pytest.raises(StepGivenUp):
        feed.next_batch(feed.batches(PLAN, 0), StepTime())  # type: ignore[arg-type]


def test_one_process_reads_where_it_uses_the_batch() -> None:
    told: list[str] = []
    feed, _ = feed_of(told, Ranks(told, world_size=1))
    batches = feed.batches(PLAN, 0)  # type: ignore[arg-type]
    feed.next_batch(batches, StepTime())
    feed.read_ahead(batches, StepTime())
    assert told == ["read 0", "begin", "end"]


class Device:
    """Marks are the times at which a device with a queue reaches them."""

    def __init__(self, reached: list[float]) -> None:
        self.reached = reached

    def mark(self) -> float:
        return self.reached.pop(0)

    def seconds_between(self, first: float, second: float) -> float:
        return second - first

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(("came", "stall"), [(4.0, 0.0), (9.0, 2.0)])
def test_waiting_ahead_is_a_stall_only_as_far_as_the_device_is_idle(came: float, stall: float) -> None:
    """The host waits 3 s from second 6 on; the device has work until then, or until second 7 at most."""
    clock = iter([0.0, 0.0, 6.0, 9.0, 9.5, 9.5, 9.5])
    first = 4.0 if came == 4.0 else 7.0
    meter = StageMeter(
        stage=0, frames=1, batch_sizes={"s": 1}, clock=lambda: next(clock, 9.5), timer=Device([first, came, 9.5])
    )
    with meter.step() as step, step.stall_ahead():
        pass
    (row,) = meter.end_window()
    assert row.stall_seconds == pytest.approx(stall)
