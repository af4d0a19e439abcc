"""`key.path=value` on the command line: applied to the plain tree before it is typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from frozen_fast.config.fields import is_text, optional_type, type_at
from frozen_fast.config.renamed import Renames, current_path, rename_keys
from frozen_fast.config.yaml_text import MAX_DEPTH, Origins, join_path, parse_scalar_or_flow
from frozen_fast.errors import UserError

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
_PATH = re.compile(rf"{_NAME}(?:\.{_NAME}|\[\d+\])*")
_STEP = re.compile(rf"\[(\d+)\]|({_NAME})")


def split_path(path: str) -> tuple[str | int, ...]:
    """Split `data.sources[0].path` into ("data", "sources", 0, "path").

    Raises:
        UserError: when the text is not such a path.
    """
    if not _PATH.fullmatch(path):
        raise UserError(f"override: got the path {path!r}; allowed: names and [indices], as in data.sources[0].path")
    steps = tuple(int(index) if index else name for index, name in _STEP.findall(path))
    if len(steps) > MAX_DEPTH:
        raise UserError(f"override: got a path of {len(steps)} steps, {path[:40]}...; allowed: {MAX_DEPTH} or fewer")
    return steps


def apply_overrides(
    tree: dict[str, Any], overrides: Sequence[str], origins: Origins, cls: type, renames: Renames
) -> None:
    """Set values in the plain tree, in order; the index one past a list's end appends.

    Args:
        tree: the whole config as plain values, defaults included; changed in place.
        overrides: texts `key.path=value`; the value is YAML.
        origins: gets an entry for each path that was set.
        cls: the schema's class of the tree: where it wants text, a number or a boolean is taken as it was typed.
        renames: keys that may be given under former names.

    Raises:
        UserError: for text without `=`, a path that leads through a scalar, or an index past the end.
    """
    for text in overrides:
        path, equals, written = text.partition("=")
        if not equals:
            raise UserError(f"override: got {text!r}; allowed: key.path=value")
        path = path.strip()
        steps = split_path(path)
        value = parse_scalar_or_flow(written, path)
        hint, _ = type_at(cls, split_path(current_path(path, renames)))
        nothing = not written.strip() and optional_type(hint) is None
        if is_text(hint) and (nothing or isinstance(value, (bool, int, float))):
            value = written.strip()
        _set(tree, steps, value, path)
        for end in range(1, len(path) + 1):
            if end == len(path) or path[end] in ".[":
                origins.setdefault(path[:end], "command line")
        origins[path] = "command line"
        rename_keys(tree, renames, origins, overwrite=True)


def merge(base: Any, over: Any) -> Any:
    """Merge two trees: mappings key by key, everything else is replaced. Returns a copy."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {
            name: merge(base.get(name), over[name]) if name in over else copy_tree(base[name])
            for name in (*base, *(name for name in over if name not in base))
        }
    return copy_tree(over)


def copy_tree(value: Any) -> Any:
    """Copy mappings and lists, including objects that a YAML alias repeats."""
    if isinstance(value, dict):
        return {name: copy_tree(item) for name, item in value.items()}
    if isinstance(value, list):
        return [copy_tree(item) for item in value]
    return value


def _set(tree: dict[str, Any], steps: tuple[str | int, ...], value: Any, path: str) -> None:
    here: Any = tree
    so_far = ""
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(here, list):
                below = f"{so_far}.KEY" if isinstance(here, dict) else f"{so_far}=VALUE"
                raise UserError(f"{path}: got an index on {so_far}, which is not a list; allowed: {below}")
            if step > len(here):
                raise UserError(f"{path}: got index {step}; allowed: 0 to {len(here)}, where {len(here)} appends")
            if step == len(here):
                here.append({} if not last and isinstance(steps[position + 1], str) else [])
        else:
            if not isinstance(here, dict):
                raise UserError(f"{path}: got the key {step!r} below {so_far}, which {_kind(here)}")
            if here.get(step) is None and not last:
                here[step] = [] if isinstance(steps[position + 1], int) else {}
        if last:
            present = here[step] if isinstance(step, int) else here.get(step)
            here[step] = merge(present, value)
        so_far = join_path(so_far, step)
        if not last:
            here = here[step]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "is a list; allowed: an index, as in [0]"
    return "is a single value; allowed: no key below it"
