"""The report's ranks: what each one takes for a step by itself, and which ones the others wait for."""

from __future__ import annotations

import statistics
from typing import Any

from frozen_fast.report.document import Block, Bullets, Caution, Table, Text, number
from frozen_fast.report.run_data import RunData

SLOWER = 1.2
"""A rank whose own time is above the median by this factor is named."""
_NOTE = (
    "Ranks, milliseconds a step after the warm-up: the wait for the rank's own loader, and its forward passes up to "
    "the exchange of features. Under zero3 and fsdp2 forward passes also wait for other ranks' weights."
)


def rank_blocks(run: RunData) -> list[Block]:
    """A table of ranks and a caution that names slow ones; empty for a run of one process."""
    rows, slow = [], []
    for stage in run.stages:
        ranks = [(rank, row) for rank, row in enumerate(stage.get("ranks") or []) if row.get("steps")]
        if len(ranks) < 2:
            continue
        own = [_milliseconds(row, "reading_seconds") + _milliseconds(row, "forward_seconds") for _, row in ranks]
        median = statistics.median(own)
        for (rank, row), time in zip(ranks, own, strict=True):
            parts = [_milliseconds(row, "reading_seconds"), _milliseconds(row, "forward_seconds")]
            share = f"{100 * (time / median - 1):+.0f} %" if median else ""
            rows.append([str(stage["stage"] + 1), str(rank), *(number(part) for part in parts), share])
            if median and time > SLOWER * median:
                named = f"rank {rank} ({_device(run, rank)}), stage {stage['stage'] + 1}: {share}"
                slow.append(f"{named} (loader {parts[0]:.1f} ms, forward {parts[1]:.1f} ms a step)")
    if not rows:
        return []
    blocks: list[Block] = [Text(_NOTE), Table(["Stage", "Rank", "Loader", "Forward", "Against the median"], rows)]
    if slow:
        blocks += [Caution("Ranks slower than the median by more than 20 %:"), Bullets(slow)]
    return blocks


def _milliseconds(row: dict[str, Any], key: str) -> float:
    return 1000 * float(row[key]) / int(row["steps"])


def _device(run: RunData, rank: int) -> str:
    devices = run.environment.get("devices") or []
    return str(devices[rank]) if rank < len(devices) else "unknown device"
