from __future__ import annotations

from pathlib import Path

import pytest

from frozen_fast.common.files import read_json_lines
from frozen_fast.data.load.bad_clips import BadClip, BadClipLedger
from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder


def bad(number: int, cause: str = "truncated") -> BadClip:
    return BadClip("web", f"c{number}", f"/data/c{number}.mp4", cause, "no more bytes", "c99")


def test_rows_are_appended_in_the_agreed_form(tmp_path: Path) -> None:
    ledger = BadClipLedger(RunFolder(tmp_path).append_bad_clips, 0.5)
    ledger.record(3, 8, [bad(1)])
    ledger.record(4, 8, [])
    ledger.record(5, 8, [bad(2, "missing")])
    assert read_json_lines(tmp_path / "bad_clips.jsonl") == [
        {
            "step": 3,
            "source": "web",
            "clip_id": "c1",
            "path": "/data/c1.mp4",
            "cause": "truncated",
            "message": "no more bytes",
            "replaced_by": "c99",
        },
        {
            "step": 5,
            "source": "web",
            "clip_id": "c2",
            "path": "/data/c2.mp4",
            "cause": "missing",
            "message": "no more bytes",
            "replaced_by": "c99",
        },
    ]
    assert (ledger.clips, ledger.bad, ledger.causes) == (24, 2, {"truncated": 1, "missing": 1})
    assert ledger.share == pytest.approx(2 / 26)


def test_the_share_counts_once_enough_clips_were_tried() -> None:
    ledger = BadClipLedger(None, 0.05)
    ledger.record(1, 7, [bad(1)])
    ledger.check()  # 1 of 8 says nothing yet
    with pytest.raises(UserError, match="1 of 8 clips are unreadable, 12.5 %"):
        ledger.check(final=True)
    ledger.record(2, 39, [bad(2)])  # 2 of 48
    ledger.check()
    ledger.record(3, 8, [bad(3, "missing")])
    with pytest.raises(UserError, match=r"3 of 57 .*5.3 % \(truncated: 2, missing: 1; .*c3.mp4.*allowed: 5 %"):
        ledger.check()


def test_a_share_at_the_limit_is_allowed() -> None:
    ledger = BadClipLedger(None, 0.05)
    ledger.record(1, 95, [bad(number) for number in range(5)])
    ledger.check(final=True)
    assert ledger.share == 0.05


def test_no_clips_and_no_bad_clips_are_fine() -> None:
    ledger = BadClipLedger(None, 0.0)
    assert ledger.share == 0
    ledger.check(final=True)
    ledger.record(1, 1000, [])
    ledger.check(final=True)


def test_counts_survive_a_checkpoint() -> None:
    ledger = BadClipLedger(None, 0.05)
    ledger.record(1, 94, [bad(number) for number in range(5)])
    again = BadClipLedger(None, 0.05)
    again.resume(ledger.to_json())
    assert (again.clips, again.causes) == (94, {"truncated": 5})
    with pytest.raises(UserError, match="5 of 99"):
        again.check()
