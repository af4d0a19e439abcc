"""Conversion of plain values to the schema's sections with pydantic; each mistake becomes one line with its path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from frozen_fast.config import fields
from frozen_fast.config.keys import MISTAKES, UNKNOWN_NAME, OneOf
from frozen_fast.config.schema import ExperimentConfig
from frozen_fast.config.yaml_text import Origins, join_path
from frozen_fast.errors import UserErrors, unknown_name

T = TypeVar("T")

_RANGES = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")


def build(cls: type[T], tree: Any, *, origins: Origins | None = None) -> T:
    """Build a section of the schema from a mapping.

    The values are validated as JSON: pydantic's strict mode then accepts mappings for sections and lists for tuples,
    but no number for a text.

    Args:
        cls: a section of the schema.
        tree: mapping of its keys to plain values; absent keys keep their defaults.
        origins: file and line of each value, for messages.

    Raises:
        UserErrors: every unknown key (with the nearest valid one), wrong type, value that is not allowed, and keys
            that contradict each other.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [line for details in error.errors(include_url=False) for line in _lines(cls, details, origins or {})]
        raise UserErrors(*dict.fromkeys(lines)) from None


def _lines(cls: type, error: ErrorDetails, origins: Origins) -> list[str]:
    """One of pydantic's errors as "path: got ...; allowed: ... (origin)"."""
    kind, got = error["type"], error["input"]
    steps = error["loc"][:-1] if kind == "missing" else error["loc"]  # a tuple too short; every key has a default
    path = ""
    for step in steps:
        path = join_path(path, step)
    if kind == "unexpected_keyword_argument":
        return [f"{_unknown_key(cls, steps, path)}{_where(path, origins)}"]
    if kind == MISTAKES:
        found = [(join_path(path, below) if below else path, what) for below, what in error["ctx"]["found"]]
        return [f"{here or 'config'}: {what}{_where(here, origins)}" for here, what in found]
    hint, limits = fields.type_at(cls, steps)
    hint = fields.optional_type(hint) or hint if got is not None else hint
    names = next((limit.names() for limit in limits if isinstance(limit, OneOf)), None)
    if kind == UNKNOWN_NAME and names is not None:
        return [f"{unknown_name(path, got, names)}{_where(path, origins)}"]
    if get_origin(hint) is Literal and isinstance(got, str):
        return [f"{unknown_name(path, got, map(str, get_args(hint)))}{_where(path, origins)}"]
    if kind in _RANGES:
        return [f"{path}: got {got!r}; allowed: {fields.range_in_words(limits)}{_where(path, origins)}"]
    if kind == "string_pattern_mismatch":
        return [f"{path}: got {got!r}; allowed: text that is not empty{_where(path, origins)}"]
    allowed = "a finite number" if kind == "finite_number" else fields.type_in_words(hint)
    return [f"{path or 'config'}: got {_in_words(got)}; allowed: {allowed}{_where(path, origins)}"]


def _unknown_key(cls: type, steps: Sequence[str | int], path: str) -> str:
    """A key that the schema does not have, with the nearest one here, or one of that name elsewhere."""
    *above, name = steps
    parent = fields.type_at(cls, above)[0]
    inside = path[: len(path) - len(str(name))].removesuffix(".")
    here = [info.name for info in fields.keys_of(fields.optional_type(parent) or parent)]
    near = [join_path(inside, match) for match in get_close_matches(str(name), here, n=1, cutoff=0.5)]
    near = near or [other for other, info in fields.walk_keys(ExperimentConfig) if info.name == name]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"{path}: got an unknown key{hint}; allowed{f' in {inside}' if inside else ''}: {', '.join(here)}"


def _where(path: str, origins: Origins) -> str:
    """Where the value at `path`, or what contains it, was written."""
    while path:
        if path in origins:
            return f" ({origins[path]})"
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return ""


def _in_words(value: Any) -> str:
    """A received value with its kind, short enough for one line."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items"
    if isinstance(value, bool):
        return str(value).lower()
    kind = {int: "an integer", float: "a number", str: "text"}.get(type(value), type(value).__name__)
    return f"{repr(value)[:80]}, {kind}"
