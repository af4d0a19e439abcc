"""The exception for users' mistakes, and helpers for its messages."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

MOST_NAMES = 3
MOST_CHARACTERS = 250
_REFUSED_PICKLE = "Weights only load failed"


class UserError(ValueError):
    """A mistake in config, data or arguments; the message is one line for the user.

    Say what was wrong in the form "field: got value; allowed ...". The command line
    prints it without a traceback and exits with code 2.
    """


class UserErrors(UserError):
    """Several mistakes, one line each."""

    def __str__(self) -> str:
        """Return the mistakes, one per line."""
        return "\n".join(str(mistake) for mistake in self.args)


def unknown_name(field: str, got: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a table, with the nearest valid name."""
    return UserError(f"{field}: {unknown_value(got, allowed)}")


def unknown_value(got: str, allowed: Iterable[str]) -> str:
    """Say that a name is not in a table, with the nearest valid name: "got ...; allowed: ..."."""
    names = sorted(allowed)
    got = got if len(got) <= MOST_CHARACTERS else got[:MOST_CHARACTERS] + ".."
    near = get_close_matches(got, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"got {got!r}{hint}; allowed: {', '.join(names)}"


def some(names: Collection[str]) -> str:
    """Return up to three of the names, in order, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more


def reason(error: Exception) -> str:
    """Return an exception as one short line: its kind and the first line of its message.

    PyTorch's message for a refused pickle is left out: it recommends to load the file without protection.
    """
    if _REFUSED_PICKLE in str(error):
        return f"{type(error).__name__}: the file contains objects other than tensors"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MOST_CHARACTERS]
