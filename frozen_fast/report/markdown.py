"""A report as GitHub-flavoured Markdown that reads as plain text too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from frozen_fast.report.document import Block, Bullets, Caution, Document, Link, Listing, Plot, Table

PADDED = 48
"""Longer cells do not widen their column."""


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown."""
    parts = [f"# {_inline(document.title)}", _inline(document.subtitle)]
    if document.numbers:
        parts.append(
            "\n".join(f"- **{f.label}: {f.value}**" + (f" ({f.note})" if f.note else "") for f in document.numbers)
        )
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts.extend(_block(block) for block in section.blocks)
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, padded so that it reads as plain text too."""
    rows = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    if table.total and table.rows:
        rows[-1] = [f"**{cell}**" if cell else "" for cell in rows[-1]]
    columns = range(len(table.header))
    widths = [max(3, *(len(row[column]) for row in rows if len(row[column]) <= PADDED)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < table.words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < table.words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_inline(item)}" for item in block.items)
    if isinstance(block, Caution):
        return f"**Note:** {_inline(block.text)}"
    if isinstance(block, Link):
        return f"[{_inline(block.text)}]({quote(block.file)})"
    if isinstance(block, Plot):
        return f"*Plot in report.html: {block.caption}*"
    if isinstance(block, Listing):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return f"<details><summary>{block.title}</summary>\n\n{fence}\n{block.text.rstrip()}\n{fence}\n\n</details>"
    return _inline(block.text)


def _inline(text: str) -> str:
    """A text whose names cannot become HTML or links."""
    return text.replace("<", "\\<").replace("](", "]\\(")


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|").replace("\n", " ")
