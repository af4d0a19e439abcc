"""A report as a list of blocks, which markdown.py and html.py render, and formatting of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

NOT_AVAILABLE = "n/a"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Caution:
    """A highlighted paragraph."""

    kind: ClassVar[str] = "caution"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; the first `words` columns contain text, the others numbers, `total` marks the last row."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    total: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture as SVG text; Markdown refers to the HTML report for it."""

    kind: ClassVar[str] = "plot"
    svg: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Preformatted text, folded away in HTML."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str


@dataclass(frozen=True)
class Link:
    """A paragraph with a link to another file of the run folder."""

    kind: ClassVar[str] = "link"
    text: str
    file: str


Block = Text | Caution | Bullets | Table | Plot | Listing | Link


@dataclass(frozen=True)
class Section:
    """A heading and its content."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class KeyNumber:
    """A number at the top of the report: label, value and a number for comparison."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    numbers: Sequence[KeyNumber] = field(default_factory=list)
    sections: Sequence[Section] = field(default_factory=list)


def number(value: float | None, digits: int = 1) -> str:
    """A number with a given number of decimals, thousands separated."""
    return NOT_AVAILABLE if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number, thousands apart."""
    return NOT_AVAILABLE if value is None else f"{value:,.0f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with a given number of significant digits and no exponent."""
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
