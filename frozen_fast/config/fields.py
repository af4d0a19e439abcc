"""What the schema's dataclasses say about themselves: names, types, defaults, meanings."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class KeyInfo:
    """One key of one dataclass of the schema."""

    name: str
    type: Any
    default: Any
    meaning: str

    @property
    def is_section(self) -> bool:
        """Whether the key holds a nested group of keys."""
        return is_dataclass(self.type)

    @property
    def item_class(self) -> type | None:
        """The dataclass of the key's list items, if it is a list of groups of keys."""
        item = list_item_type(self.type)
        return item if is_dataclass(item) else None  # type: ignore[return-value]


def keys_of(cls: type) -> tuple[KeyInfo, ...]:
    """The keys of a schema dataclass, in order."""
    hints = get_type_hints(cls)
    infos = []
    for entry in fields(cls):
        factory = entry.default_factory
        default = entry.default if factory is MISSING else factory()
        infos.append(KeyInfo(entry.name, hints[entry.name], default, entry.metadata["meaning"]))
    return tuple(infos)


def list_item_type(hint: Any) -> Any | None:
    """X of `tuple[X, ...]`, None for any other type."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None


def mapping_value_type(hint: Any) -> Any | None:
    """X of `tuple[tuple[str, X], ...]`, which YAML writes as a mapping; None for any other type."""
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


def type_in_words(hint: Any) -> str:
    """The type as a user reads it."""
    simple = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
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
    assert get_origin(hint) is tuple, f"the schema holds a type that the loader does not know: {hint}"
    return f"a list of {len(arguments)} {_plural(arguments[0])}"


def _plural(hint: Any) -> str:
    words = {int: "integers", float: "numbers", str: "texts", bool: "booleans"}
    return words.get(hint) or ("mappings" if is_dataclass(hint) else type_in_words(hint))


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
        return {info.name: _mapping_or_plain(info.type, getattr(value, info.name)) for info in keys_of(type(value))}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _mapping_or_plain(hint: Any, value: Any) -> Any:
    if mapping_value_type(hint) is not None:
        return {name: to_plain(item) for name, item in value}
    return to_plain(value)
