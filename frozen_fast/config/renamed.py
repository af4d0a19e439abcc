"""Former names of config keys and values: accepted with a warning that gives the new name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from frozen_fast.config.yaml_text import Origins, join_path
from frozen_fast.errors import UserError

log = logging.getLogger(__name__)

Renames = Mapping[str, "str | Callable[[Any], dict[str, Any]]"]
"""Old path -> new path, or a function from the old value to new paths and values. `[i]` stands for any index."""


def trackers_of_wandb_mode(mode: Any) -> dict[str, Any]:
    """`tracking.trackers` and `tracking.wandb_mode`."""
    if mode == "off":
        return {"tracking.trackers": []}
    return {"tracking.trackers": ["wandb"], "tracking.wandb_mode": mode}


def current_attention(backend: Any) -> dict[str, Any]:
    """Its values native and batched are `cpu_c`."""
    return {"model.video.attention": "cpu_c" if backend in ("native", "batched") else backend}


EXPERIMENT: Renames = {
    "model.video.attention": current_attention,
    "data.sources[i].cut": "data.sources[i].split_version",
    "evaluation.sources[i].cut": "evaluation.sources[i].split_version",
    "data.decode.max_image_pixels": "data.decode.max_pixels",
    "wandb.mode": trackers_of_wandb_mode,
    "wandb.project": "tracking.project",
    "wandb.name": "tracking.run_name",
}
"""Renamed keys of an experiment, and keys with renamed values."""


def current_path(path: str, renames: Renames) -> str:
    """The current path of a key."""
    new = renames.get(re.sub(r"\[\d+\]", "[i]", path))
    return _with_indices(new, path) if isinstance(new, str) else path


def rename_keys(tree: dict[str, Any], renames: Renames, origins: Origins, *, overwrite: bool = False) -> None:
    """Move the values of old keys to the new ones, each with a warning.

    A function of the table that gives a key its own value back changes nothing.

    Args:
        tree: plain values, changed in place.
        renames: the table.
        origins: where values were written; follows the moves.
        overwrite: an old key replaces the new one's value, as a later override does; otherwise both are a mistake.

    Raises:
        UserError: the tree holds a key under both names.
    """
    for path in list(_paths(tree, "")):
        new = renames.get(re.sub(r"\[\d+\]", "[i]", path))
        if new is None:
            continue
        value = _value_at(tree, path)
        targets = {_with_indices(new, path): value} if isinstance(new, str) else new(value)
        if targets == {path: value}:
            continue
        _take(tree, path)
        where = origins.pop(path, "")
        for target, moved in targets.items():
            _put(tree, target, moved, path, overwrite)
            origins[target] = where
        if os.environ.get("RANK", "0") == "0":
            old = f"{path}={value}" if path in targets else path
            use = " and ".join(f"{name}={targets[name]}" if name == path else name for name in targets)
            log.warning("%s%s was renamed, use %s", old, f" ({where})" if where else "", use)


def _with_indices(pattern: str, path: str) -> str:
    for index in re.findall(r"\[\d+\]", path):
        pattern = pattern.replace("[i]", index, 1)
    return pattern


def _paths(node: Any, path: str) -> Iterator[str]:
    """The path of every value in a tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for step, value in items:
        below = join_path(path, step)
        yield below
        yield from _paths(value, below)


def _steps(path: str) -> list[str | int]:
    return [int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([^.\[]+)", path)]


def _value_at(tree: dict[str, Any], path: str) -> Any:
    here: Any = tree
    for step in _steps(path):
        here = here[step]
    return here


def _take(tree: dict[str, Any], path: str) -> Any:
    """Remove a value, and the mapping that held it where nothing else is left there."""
    *above, last = _steps(path)
    holders: list[Any] = [tree]
    for step in above:
        holders.append(holders[-1][step])
    value = holders[-1].pop(last)
    if not holders[-1] and len(above) == 1:
        tree.pop(str(above[0]))
    return value


def _put(tree: dict[str, Any], path: str, value: Any, old: str, overwrite: bool) -> None:
    *above, last = _steps(path)
    here: Any = tree
    for step in above:
        here = here[step] if isinstance(step, int) else here.setdefault(step, {})
    if not overwrite and last in here:
        raise UserError(f"{old}: got {value!r} beside {path}, its new name; allowed: {path} alone")
    here[last] = value
