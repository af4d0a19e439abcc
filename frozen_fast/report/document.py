"""A report as plain blocks, and its Markdown form; report_html has the other. Also how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NOT_AVAILABLE = "n/a"
# Longer cells do not widen their column in Markdown.
PADDED = 48


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Caution:
    """A paragraph that a reader must not miss."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; `words` counts the first columns that hold words (the rest are figures), `total` marks the last row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    total: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture as SVG text; Markdown refers to the HTML report for it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Preformatted text, folded away in HTML."""

    title: str
    text: str


Block = Text | Caution | Bullets | Table | Plot | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Figure:
    """One of the headline's numbers: what, how much, and with what it is to be compared."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    figures: Sequence[Figure] = field(default_factory=list)
    sections: Sequence[Section] = field(default_factory=list)


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown."""
    parts = [f"# {document.title}", document.subtitle]
    if document.figures:
        parts.append(
            "\n".join(f"- **{f.label}: {f.value}**" + (f" ({f.note})" if f.note else "") for f in document.figures)
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
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Caution):
        return f"**Note:** {block.text}"
    if isinstance(block, Plot):
        return f"*Plot in report.html: {block.caption}*"
    if isinstance(block, Listing):
        return f"<details><summary>{block.title}</summary>\n\n```\n{block.text.rstrip()}\n```\n\n</details>"
    return block.text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float | None, digits: int = 1) -> str:
    """A number with so many decimals, thousands apart."""
    return NOT_AVAILABLE if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number, thousands apart."""
    return NOT_AVAILABLE if value is None else f"{value:,.0f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent."""
    if value is None:
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    decimals = max(0, digits - 1 - magnitude)
    return f"{round(value, digits - 1 - magnitude):,.{decimals}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent."""
    return NOT_AVAILABLE if share is None else f"{100 * share:.{digits}f} %"


def gibibytes(size: float | None) -> str:
    """Bytes as GiB."""
    return NOT_AVAILABLE if size is None else f"{size / 2**30:.2f} GiB"


def joules(energy: float | None) -> str:
    """Joules as 532 J, 12.3 kJ or 4.56 MJ."""
    if energy is None:
        return NOT_AVAILABLE
    scale, unit = next((s, u) for s, u in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")) if energy >= s or u == "J")
    return f"{significant(energy / scale)} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as 4.2 s, 3:25 min or 2:03:25 h."""
    if seconds is None:
        return NOT_AVAILABLE
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"
