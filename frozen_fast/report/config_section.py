"""The report's copy of the resolved config."""

from __future__ import annotations

from frozen_fast.report.document import Listing, Section
from frozen_fast.report.run_data import RunData


def config_section(run: RunData) -> Section | None:
    """The content of config.yaml; None if it is missing."""
    return Section("Config", [Listing("config.yaml, resolved", run.config_text)]) if run.config_text else None
