"""Pieces of one-line messages that several modules here share."""

from __future__ import annotations

from collections.abc import Collection

MOST_NAMES = 3
MOST_CHARACTERS = 250


def some(names: Collection[str]) -> str:
    """Return up to three of the names, in order, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more


def reason(error: Exception) -> str:
    """Return an exception as one short line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MOST_CHARACTERS]
