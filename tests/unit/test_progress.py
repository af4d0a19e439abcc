"""Progress of long work: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys

import pytest

from frozen_fast.common import progress as module
from frozen_fast.common.progress import progress


def test_lines_come_at_intervals_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for last_line, lines in ((True, 2), (False, 1)):
        now[0] = 0.0
        tell = progress("pack", 40, last_line=last_line)
        for _ in range(4):
            now[0] += 4.0
            tell(9, 1)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and said[0] == "pack: 30 of 40 clips, 3 bad, 2.5 clips/s, 0 min 4 s left"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tell = progress("evaluate", 3)
    tell(2, 0)
    tell(0, 1)
    shown = capsys.readouterr().err
    assert "evaluate: 100%" in shown and "3/3" in shown and "bad=1" in shown
