"""Ranks that a launcher starts again meet in a key-value store of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from frozen_fast.parallel.restarts import use_a_new_store


def variables(port: int, rank: int, **changes: str) -> dict[str, str]:
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "GROUP_WORLD_SIZE": "1"}
    return {**found, "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", **changes}


def test_every_rank_of_a_later_start_gets_one_new_port() -> None:
    launcher = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    starts = []
    for count in ("1", "2"):
        ranks = [variables(launcher.port, rank, TORCHELASTIC_RESTART_COUNT=count) for rank in (1, 0)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(use_a_new_store, ranks))
        assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] != str(launcher.port)
        assert {rank["TORCHELASTIC_USE_AGENT_STORE"] for rank in ranks} == {"False"}
        starts.append(ranks[0]["MASTER_PORT"])
    assert len(set(starts)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"TORCHELASTIC_RESTART_COUNT": "0"},
        {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        {"GROUP_WORLD_SIZE": "2"},
    ],
)
def test_other_starts_are_left_alone(changes: dict[str, str]) -> None:
    environ = variables(1, 0, **changes)
    before = dict(environ)
    use_a_new_store(environ)
    assert environ == before


def test_without_a_launcher_nothing_changes() -> None:
    environ: dict[str, str] = {}
    use_a_new_store(environ)
    assert environ == {}
