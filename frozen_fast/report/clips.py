"""The report's sections on clips: sources, dropped rows and unreadable clips."""

from __future__ import annotations

from typing import Any

from frozen_fast.report.document import Block, Listing, Section, Table, Text, count, percent
from frozen_fast.report.run_data import RunData

MAX_BAD_CLIPS_LISTED = 30


def sources_section(run: RunData) -> Section | None:
    """The sources at the start of the run; None if environment.json does not contain them."""
    sets = [
        (use, name, described)
        for use, key in (("training", "sources"), ("evaluation", "evaluation_sources"))
        for name, described in (run.environment.get(key) or {}).items()
    ]
    if not sets:
        return None
    rows = [_set_cells(use, name, described) for use, name, described in sets]
    blocks: list[Block] = [Table(["Use", "Set", "Kind", "Rows read", "Left out", "Clips"], rows, words=3)]
    drops = [
        [use, name, cause, count(dropped)]
        for use, name, described in sets
        for cause, dropped in (described.get("drops") or {}).items()
    ]
    if drops:
        blocks.append(Text("Rows dropped when the sources were read:"))
        blocks.append(Table(["Use", "Set", "Cause", "Rows"], drops, words=3))
    return Section("Clips", blocks)


def _set_cells(use: str, name: str, described: dict[str, Any]) -> list[str]:
    clips, dropped = int(described["clips"]), sum((described.get("drops") or {}).values())
    return [use, name, str(described.get("kind", "")), count(clips + dropped), count(dropped), count(clips)]


def bad_clips_section(run: RunData) -> Section:
    """Unreadable clips, by cause and by name."""
    counts = run.bad_clip_counts()
    if not counts:
        return Section("Unreadable clips", [Text("None.")])
    seen = sum(total.clips for total in run.totals())
    share = f", {percent(len(run.bad_clips) / seen, 2)} of the clips read" if seen else ""
    table = Table(["Set", "Cause", "Clips"], [[source, cause, count(n)] for source, cause, n in counts], words=2)
    listed = [
        f"step {row.get('step')}  {row.get('source')}  {row.get('clip_id')}  {row.get('path')}  "
        f"{row.get('cause')}: {row.get('message')}  (replaced by {row.get('replaced_by')})"
        for row in run.bad_clips[:MAX_BAD_CLIPS_LISTED]
    ]
    title = f"The first {len(listed)}" if len(run.bad_clips) > len(listed) else "Each of them"
    text = Text(f"{count(len(run.bad_clips))} unreadable clips were replaced or excluded{share}.")
    return Section("Unreadable clips", [text, table, Listing(title, "\n".join(listed))])
