"""Events of a run (events.jsonl): damaged files, failed writes, non-finite losses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

_MOST_EVENTS = 20


def describe_events(events: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each of the last events of events.jsonl, the oldest first."""
    lines = []
    for row in events[-_MOST_EVENTS:]:
        moment = row.get("time")
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment)) if isinstance(moment, (int, float)) else ""
        lines.append(f"{when} {row.get('kind', '')}: {row.get('message', '')}".strip())
    if len(events) > _MOST_EVENTS:
        lines.insert(0, f"{len(events) - _MOST_EVENTS} earlier ones are in events.jsonl")
    return lines
