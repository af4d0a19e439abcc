"""A report as one self-contained HTML file: inline pictures, no scripts, no external resources."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from frozen_fast.report.document import Document


def to_html(document: Document) -> str:
    """Render the document with the template page.html; all text is escaped."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html").render(document=document)
