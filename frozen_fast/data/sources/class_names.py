"""Class names of action recognition data sets as words, for prompts and reports."""

from __future__ import annotations

import re

_CASE_CHANGE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def in_words(name: str) -> str:
    """Split a name at capitals and underscores, in lower case: ApplyEyeMakeup is "apply eye makeup"."""
    return " ".join(_CASE_CHANGE.sub(" ", name).replace("_", " ").lower().split())
