"""A report as one self-contained HTML file: pictures inline, no scripts, nothing fetched, fit for printing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from frozen_fast.report.document import (
    Block,
    Bullets,
    Caution,
    Document,
    Figure,
    Listing,
    Plot,
    Section,
    Table,
)


def to_html(document: Document) -> str:
    """The document as a whole HTML page; every text is escaped."""
    style = resources.files("frozen_fast.report").joinpath("report.css").read_text(encoding="utf-8")
    body = [f"<header><h1>{escape(document.title)}</h1><p>{escape(document.subtitle)}</p></header>"]
    if document.figures:
        body.append(f'<div class="figures">{"".join(_figure(figure) for figure in document.figures)}</div>')
    body.extend(_section(section) for section in document.sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(document.title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _figure(figure: Figure) -> str:
    note = f'<span class="note">{escape(figure.note)}</span>' if figure.note else ""
    return (
        f'<div class="figure"><span class="label">{escape(figure.label)}</span>'
        f'<span class="value">{escape(figure.value)}</span>{note}</div>'
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section><h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Plot):
        caption = escape(block.caption)
        return f'<div class="plot" role="img" aria-label="{caption}">{block.svg}<p>{caption}</p></div>'
    if isinstance(block, Listing):
        return f"<details><summary>{escape(block.title)}</summary><pre>{escape(block.text)}</pre></details>"
    kind = ' class="caution"' if isinstance(block, Caution) else ""
    return f"<p{kind}>{escape(block.text)}</p>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        parts = (
            f"<{tag}{'' if column < table.words else ' class=n'}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr{kind}>{''.join(parts)}</tr>"

    last = len(table.rows) - 1 if table.total else -1
    rows = [row(cells, "td", " class=total" if index == last else "") for index, cells in enumerate(table.rows)]
    head = row(table.header, "th")
    return f'<div class="table"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
