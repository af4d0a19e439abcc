"""Plain values into the schema's dataclasses, with every type checked and every mistake named by its path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin

from frozen_fast.config import fields
from frozen_fast.config.schema import ExperimentConfig
from frozen_fast.config.yaml_text import Origins, join_path
from frozen_fast.errors import UserError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class CommandLineScalar:
    """A number, boolean or nothing typed on the command line; its text is kept for keys that want text."""

    value: Any
    text: str


def build(cls: type[T], tree: Any, *, origins: Origins | None = None, path: str = "") -> T:
    """Fill a schema dataclass from a mapping.

    Args:
        cls: a dataclass of the schema.
        tree: mapping of its keys; absent keys keep their defaults.
        origins: where values were written, for messages.
        path: path of `tree` in the whole config.

    Raises:
        UserError: for an unknown key (with the nearest valid one), a wrong type or a value that is not allowed.
    """
    return _Converter(origins or {}).section(cls, tree, path)


class _Converter:
    """Converts values; knows where each was written."""

    def __init__(self, origins: Origins):
        self.origins = origins

    def section(self, cls: type[T], tree: Any, path: str) -> T:
        if not isinstance(tree, Mapping):
            raise self.error(path or "config", tree, "a mapping of keys")
        infos = {info.name: info for info in fields.keys_of(cls)}
        for name in tree:
            if name not in infos:
                raise self.unknown_key(cls, path, str(name))
        values = {name: self.value(infos[name].type, value, join_path(path, name)) for name, value in tree.items()}
        return cls(**values)

    def value(self, hint: Any, value: Any, path: str) -> Any:
        if hint is Any:
            return value.value if isinstance(value, CommandLineScalar) else value
        inner = fields.optional_type(hint)
        if inner is not None:
            if value is None or (isinstance(value, CommandLineScalar) and value.value is None):
                return None
            return self.value(inner, value, path)
        if is_dataclass(hint):
            return self.section(hint, value, path)  # type: ignore[arg-type]
        if get_origin(hint) is tuple:
            return self.sequence(hint, value, path)
        return self.scalar(hint, value, path)

    def sequence(self, hint: Any, value: Any, path: str) -> tuple[Any, ...]:
        mapped = fields.mapping_value_type(hint)
        if mapped is not None:
            if not isinstance(value, Mapping):
                raise self.error(path, value, fields.type_in_words(hint))
            return tuple((str(name), self.value(mapped, item, join_path(path, name))) for name, item in value.items())
        if not isinstance(value, (list, tuple)):
            raise self.error(path, value, fields.type_in_words(hint))
        item_type = fields.list_item_type(hint)
        if item_type is None:
            types = get_args(hint)
            if len(value) != len(types):
                raise self.error(path, value, fields.type_in_words(hint))
        else:
            types = (item_type,) * len(value)
        pairs = zip(types, value, strict=True)
        return tuple(self.value(kind, item, join_path(path, index)) for index, (kind, item) in enumerate(pairs))

    def scalar(self, hint: Any, value: Any, path: str) -> Any:
        choices = get_args(hint) if get_origin(hint) is Literal else None
        wants_text = hint is str or choices is not None
        if isinstance(value, CommandLineScalar):
            value = value.text if wants_text else value.value
        if choices is not None:
            if isinstance(value, str) and value not in choices:
                raise UserError(f"{unknown_name(path, value, choices)}{self.where(path)}")
            if not isinstance(value, str):
                raise self.error(path, value, fields.type_in_words(hint))
            return value
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not hint:
            raise self.error(path, value, fields.type_in_words(hint))
        if hint is float and not math.isfinite(value):
            raise self.error(path, value, "a finite number")
        return value

    def where(self, path: str) -> str:
        """Where the value at `path`, or what contains it, was written."""
        while path:
            if path in self.origins:
                return f" ({self.origins[path]})"
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return ""

    def unknown_key(self, cls: type, path: str, name: str) -> UserError:
        """The error for a key that the schema does not have: the nearest one here, or of that name elsewhere."""
        here = [info.name for info in fields.keys_of(cls)]
        near = [join_path(path, match) for match in get_close_matches(name, here, n=1, cutoff=0.5)]
        near = near or [other for other, info in fields.walk_keys(ExperimentConfig) if info.name == name]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        full = join_path(path, name)
        inside = f" in {path}" if path else ""
        return UserError(f"{full}: got an unknown key{hint}; allowed{inside}: {', '.join(here)}{self.where(full)}")

    def error(self, path: str, value: Any, allowed: str) -> UserError:
        return UserError(f"{path}: got {_in_words(value)}; allowed: {allowed}{self.where(path)}")


def _in_words(value: Any) -> str:
    """A received value with its kind, short enough for one line."""
    if isinstance(value, CommandLineScalar):
        value = value.value
    if value is None:
        return "null (nothing)"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items"
    kind = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(
        type(value), type(value).__name__
    )
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{shown[:80]}, {kind}" if not isinstance(value, bool) else shown
