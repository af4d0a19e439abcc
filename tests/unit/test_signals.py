"""Signals and a launcher's death become a wish to stop; nothing else does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from frozen_fast.data import LoaderEndedError
from frozen_fast.training import signals
from frozen_fast.training.signals import StopRequest, stop_explains


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_a_later_interrupt_is_not_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(signals, "_SIGNAL_SPREAD_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_a_later_second_term_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SIGNAL_SPREAD_SECONDS", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt, match="a second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_usr1_asks_for_one_checkpoint_and_for_no_stop() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.asked
        assert (stop.take_save_request(), stop.take_save_request()) == (True, False)


def test_an_interrupt_that_comes_twice_at_once_is_one_wish() -> None:
    """From the terminal, and from torchrun."""
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.asked


@pytest.mark.parametrize(
    ("variables", "stops"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, True),
        ({"TORCHELASTIC_RUN_ID": "1"}, True),
        ({}, False),
    ],
)
def test_a_launchers_child_stops_when_the_launcher_is_gone(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], stops: bool
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stop = StopRequest()
    assert not stop.asked
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    assert stop.asked is stops


def told_after(checks: int) -> Callable[[], bool]:
    """Answers yes from the given time it is asked on."""
    asked = [0]

    def is_asked() -> bool:
        asked[0] += 1
        return asked[0] > checks

    return is_asked


def test_a_signal_explains_a_loader_process_that_ended_even_before_it_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_SIGNAL_SPREAD_SECONDS", 60.0)
    assert stop_explains(LoaderEndedError("it ended"), told_after(3))
    monkeypatch.setattr(signals, "_SIGNAL_SPREAD_SECONDS", 0.2)
    assert not stop_explains(LoaderEndedError("it ended"), lambda: False)


def test_other_failures_are_forgiven_only_when_the_stop_came_first() -> None:
    assert stop_explains(ZeroDivisionError("a defect"), lambda: True)
    assert not stop_explains(ZeroDivisionError("a defect"), told_after(1))
