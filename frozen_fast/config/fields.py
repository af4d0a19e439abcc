"""Introspection of the schema: names, types, defaults, meanings and allowed values of its keys."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from frozen_fast.config.keys import OneOf


@dataclass(frozen=True)
class KeyInfo:
    """One key of one section of the schema."""

    name: str
    type: Any
    default: Any
    meaning: str
    limits: tuple[Any, ...]

    @property
    def is_section(self) -> bool:
        """Whether the key holds a nested group of keys."""
        return is_dataclass(self.type)

    @property
    def item_class(self) -> type | None:
        """The section of the key's list items, if it is a list of groups of keys."""
        item = list_item_type(self.type)
        return item if is_dataclass(item) else None  # type: ignore[return-value]

    @property
    def allowed(self) -> str:
        """The allowed values in words; for a table, the names of the built-in parts."""
        table = next((limit for limit in self.limits if isinstance(limit, OneOf)), None)
        null = ", or null" if optional_type(self.type) else ""
        if table is not None:
            return ", ".join(table.built_in()) + null
        limits = range_in_words(self.limits)
        words = type_in_words(optional_type(self.type) or self.type)
        return f"{words}{f', {limits}' if limits else ''}{null}"


def keys_of(cls: type) -> tuple[KeyInfo, ...]:
    """The keys of a section, in order."""
    known: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return tuple(
        KeyInfo(
            name,
            info.annotation,
            info.get_default(call_default_factory=True),
            info.description or "",
            tuple(info.metadata),
        )
        for name, info in known.items()
    )


def without_limits(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split `Annotated[X, limits]` into X and the limits."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    inner, *marks = get_args(hint)
    limits: list[Any] = []
    for mark in marks:
        limits += mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return inner, tuple(limits)


def type_at(cls: type, steps: Sequence[str | int]) -> tuple[Any, tuple[Any, ...]]:
    """The type and the limits of the key at a path below a section; (Any, ()) for an unknown key."""
    hint: Any = cls
    limits: tuple[Any, ...] = ()
    for step in steps:
        inner = optional_type(hint) or hint
        if is_dataclass(inner):
            info = next((info for info in keys_of(inner) if info.name == step), None)  # type: ignore[arg-type]
            if info is None:
                return Any, ()
            hint, limits = info.type, info.limits
            continue
        pair = get_args(inner)
        item = mapping_value_type(inner) if isinstance(step, str) else list_item_type(inner)
        if item is None and isinstance(step, int) and get_origin(inner) is tuple and step < len(pair):
            item = pair[step]
        if item is None:
            return Any, ()
        hint, limits = without_limits(item)
    return hint, limits


def list_item_type(hint: Any) -> Any | None:
    """X of `tuple[X, ...]`, None for any other type."""
    arguments = get_args(without_limits(hint)[0])
    if get_origin(without_limits(hint)[0]) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None


def mapping_value_type(hint: Any) -> Any | None:
    """X of `Named[X]`, a tuple of pairs that YAML writes as a mapping; None for any other type."""
    item = list_item_type(hint)
    arguments = get_args(item)
    if get_origin(item) is tuple and len(arguments) == 2 and arguments[0] is str and arguments[1] is not Ellipsis:
        return arguments[1]
    return None


def optional_type(hint: Any) -> Any | None:
    """X of `X | None`, None for any other type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    inner = [argument for argument in get_args(hint) if argument is not type(None)]
    assert len(inner) == 1 and len(get_args(hint)) == 2, f"the schema may only join a type with None, not {hint}"
    return inner[0]


def is_text(hint: Any) -> bool:
    """Whether a key of this type is a text."""
    hint = optional_type(hint) or hint
    return hint is str or (get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)))


def type_in_words(hint: Any) -> str:
    """The type in words."""
    hint, _ = without_limits(hint)
    simple = {int: "an integer", float: "a number", str: "text", bool: "true or false", Any: "a value"}
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        return "a mapping of keys"
    inner = optional_type(hint)
    if inner is not None:
        return f"{type_in_words(inner)}, or null"
    if get_origin(hint) is Literal:
        return ", ".join(str(value) for value in get_args(hint))
    value_type = mapping_value_type(hint)
    if value_type is not None:
        return f"a mapping from names to {_plural(value_type)}"
    item = list_item_type(hint)
    if item is not None:
        return f"a list of {_plural(item)}"
    arguments = get_args(hint)
    assert get_origin(hint) is tuple, f"the schema holds a type without words for it: {hint}"
    return f"a list of {len(arguments)} {_plural(arguments[0])}"


def _plural(hint: Any) -> str:
    hint, _ = without_limits(hint)
    words = {int: "integers", float: "numbers", str: "texts", bool: "booleans", Any: "values"}
    return words.get(hint) or ("mappings" if is_dataclass(hint) else type_in_words(hint))


def range_in_words(limits: Sequence[Any]) -> str:
    """The range that `key(ge=, gt=, le=, lt=)` allows, in words; "" without limits."""
    words = []
    least = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    most = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    above = next((limit.gt for limit in limits if isinstance(limit, Gt)), None)
    below = next((limit.lt for limit in limits if isinstance(limit, Lt)), None)
    if least is not None and most is not None:
        return f"{least} to {most}"
    words += [f"{least} or more"] if least is not None else []
    words += [f"more than {above}"] if above is not None else []
    words += [f"at most {most}"] if most is not None else []
    words += [f"below {below}"] if below is not None else []
    return ", ".join(words)


def walk_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, KeyInfo]]:
    """Every key of the schema below `cls` with its full path; list items appear as `path[i].key`."""
    for info in keys_of(cls):
        path = f"{prefix}{info.name}"
        yield path, info
        if info.is_section:
            yield from walk_keys(info.type, f"{path}.")
        elif info.item_class is not None:
            yield from walk_keys(info.item_class, f"{path}[i].")


def to_plain(value: Any) -> Any:
    """A config, or a part of one, as mappings, lists and scalars: what YAML and JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = value.__pydantic_fields__  # type: ignore[attr-defined]
        return {
            entry.name: _mapping_or_plain(hints[entry.name].annotation, getattr(value, entry.name))
            for entry in fields(value)
        }
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _mapping_or_plain(hint: Any, value: Any) -> Any:
    if mapping_value_type(hint) is not None:
        return {name: to_plain(item) for name, item in value}
    return to_plain(value)
