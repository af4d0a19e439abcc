"""Published retrieval numbers (published.yaml), which reports show next to a run's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from frozen_fast.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One published row.

    Attributes:
        source: the paper.
        table: as the paper calls it, or the paper's name if the numbers come from its repository.
        about: what was trained and tested.
        name: of the row.
        protocol: evaluation protocol, as in metrics.json.
        frames: of the tested model; None: not stated.
        numbers: metric -> value, named as in metrics.json; R@k in percent. Never re-ranked.
        parameters: of the tower that the row compares; None: not stated.
    """

    source: str
    table: str
    about: str
    name: str
    protocol: str
    frames: int | None
    numbers: dict[str, float]
    parameters: float | None = None


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("frozen_fast.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def table_names() -> tuple[str, ...]:
    """Every table of published.yaml."""
    return tuple(_tables())


def row_names(table: str) -> tuple[str, ...]:
    """The rows of a table.

    Raises:
        UserError: no such table.
    """
    if table not in _tables():
        raise unknown_name("paper.table", table, _tables())
    return tuple(_tables()[table]["rows"])


def published_row(table: str, row: str) -> PublishedRow:
    """The numbers of one row.

    Raises:
        UserError: no such table or row.
    """
    if row not in row_names(table):
        raise unknown_name("paper.row", row, row_names(table))
    values = _tables()[table]
    entry = values["rows"][row]
    return PublishedRow(
        source=values["source"],
        table=table,
        about=values["about"],
        name=row,
        protocol=entry.get("protocol", values["protocol"]),
        frames=entry["frames"],
        numbers=dict(zip(values["metrics"], map(float, entry["numbers"]), strict=True)),
        parameters=entry.get("parameters"),
    )
