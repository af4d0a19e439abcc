"""The report of a run: report.md and report.html, from the files of its run folder."""

from __future__ import annotations

import time
from pathlib import Path

from frozen_fast.common.files import write_atomically
from frozen_fast.config.extensions import report_sections
from frozen_fast.report.compare import compare_runs
from frozen_fast.report.document import Document, count
from frozen_fast.report.headline import headline
from frozen_fast.report.html import to_html
from frozen_fast.report.markdown import to_markdown
from frozen_fast.report.run_data import RunData, read_run
from frozen_fast.report.wording import devices

__all__ = ["build_report", "compare_runs", "write_report"]


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Write report.md and report.html into a run folder, finished or not.

    Returns:
        The paths of both.

    Raises:
        UserError: the folder does not contain a run.
    """
    folder = Path(folder)
    document = build_report(read_run(folder))
    markdown, html = folder / "report.md", folder / "report.html"
    write_atomically(markdown, to_markdown(document))
    write_atomically(html, to_html(document))
    return markdown, html


def build_report(run: RunData) -> Document:
    """The report of a run: the sections of the table extensions.report_sections that are not None."""
    sections = [report_sections.load(name)(run) for name in report_sections.names()]
    return Document(
        title=run.name,
        subtitle=_subtitle(run),
        numbers=headline(run),
        sections=[section for section in sections if section is not None],
    )


def _subtitle(run: RunData) -> str:
    totals = run.totals()
    frames = " => ".join(str(total.frames) for total in totals) or "no"
    started = run.environment.get("started")
    when = time.strftime(", started %Y-%m-%d %H:%M UTC", time.gmtime(started)) if started else ""
    steps = sum(total.steps for total in totals)
    clips = sum(total.clips for total in totals)
    return f"{frames} frames, {count(steps)} optimizer steps, {count(clips)} clips on {devices(run)}{when}"
