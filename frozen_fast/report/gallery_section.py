"""The report's examples: the queries found best and worst, and a link to each retrieval page."""

from __future__ import annotations

from frozen_fast.report.document import Block, Link, Section, Table, Text, count, number
from frozen_fast.report.run_data import RunData


def gallery_section(run: RunData) -> Section | None:
    """Best and worst queries of the last evaluation; None where no retrieval page was written."""
    blocks: list[Block] = []
    for page in run.galleries:
        of = f"{count(page['shown'])} of {count(page['all_queries'])} queries"
        blocks.append(Link(f"Retrieval page of {page['source']}: {of} with the clips found.", str(page["page"])))
        rows = [
            [
                label,
                str(query["text"]),
                f"{query['rank']:g}",
                str(query["own"]),
                number(query["similarity"], 3),
                str(query["first"]),
                number(query["first_similarity"], 3),
            ]
            for label in ("best", "worst")
            for query in page[label]
        ]
        header = ["", "Query", "Rank", "Own clip", "Similarity", "First clip found", "Similarity"]
        blocks.append(Table(header, rows, words=2))
    if not blocks:
        return None
    note = (
        "Best: its own clip at the lowest rank, and the furthest above the other clips. Worst: its own clip at the "
        "highest rank. Over all queries of the last evaluation."
    )
    return Section("Examples", [*blocks, Text(note)])
