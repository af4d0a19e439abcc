"""The one exception that reaches a user as a single line and exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in config, data or arguments; the message is one line for the user.

    Say what was wrong in the form "field: got value; allowed ...". The command line
    prints it without a traceback and exits with code 2.
    """


def unknown_name(field: str, got: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a table, with the nearest valid name."""
    names = sorted(allowed)
    near = get_close_matches(got, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"{field}: got {got!r}{hint}; allowed: {', '.join(names)}")
