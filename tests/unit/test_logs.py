"""The package's log: where it goes, and that one test's log does not change what the next one hears."""

from __future__ import annotations

import logging

import pytest

from frozen_fast.common.logs import set_up_logging


def test_rank_0_tells_all_and_the_others_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        set_up_logging(rank=rank)
        logging.getLogger("frozen_fast.somewhere").info("as usual")
        logging.getLogger("frozen_kernels.somewhere").warning("something is odd")
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(": ")[2] for line in lines] == (["as usual"] if rank == 0 else []) + ["something is odd"]
        assert all(("[rank 1]" in line) == (rank == 1) for line in lines)


def test_what_the_test_before_set_up_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("frozen_fast.somewhere").warning("once")
    logging.getLogger("frozen_fast").propagate = True
    logging.getLogger("frozen_fast.somewhere").warning("once more")
    assert [record.getMessage() for record in caplog.records] == ["once", "once more"]
