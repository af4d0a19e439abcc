"""Checks whether a config may resume a run: the keys that may differ from the checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from frozen_fast.errors import UserError

# Keys that may differ between a run and its continuation: they change where and how fast it runs, not its result.
_MAY_CHANGE = (
    "name",
    "run_folder",
    "paper_row",
    "paper.",
    "data.decode.",
    "model.video.attention",
    "model.video.checkpointed_blocks",
    "optimizer.fused",
    "loss.local",
    "loss.chunk_rows",
    "training.",
    "checkpoints.",
    "watchdog.",
    "evaluation.",
    "tracking.",
)
_MUST_NOT_CHANGE = ("training.precision",)
_SOURCE_PATH = re.compile(r"data\.sources\[\d+\]\.path")  # moved data: RunState.sources tells whether it is the same


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], also: Collection[str] = ()) -> list[str]:
    """Compare a checkpoint's config with the one it is resumed with.

    Args:
        saved: the checkpoint's config in plain values.
        current: the present config in plain values.
        also: further keys that may differ.

    Returns:
        The allowed differences: "key: old -> new".

    Raises:
        UserError: naming the keys that must not differ.
    """
    old, new = dict(_flat(saved)), dict(_flat(current))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    harmful = [key for key in changed if key not in also and not _may_change(key)]
    if harmful:
        shown = "; ".join(f"{key} was {old.get(key)!r}, got {new.get(key)!r}" for key in harmful[:4])
        more = f" and {len(harmful) - 4} more" if len(harmful) > 4 else ""
        raise UserError(
            f"--resume: the config differs from that of the run: {shown}{more}; "
            "allowed: the same values, or another run_folder"
        )
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]


def _may_change(key: str) -> bool:
    """Whether a run may resume with another value of this key."""
    if key in _MUST_NOT_CHANGE:
        return False
    return key.startswith(_MAY_CHANGE) or _SOURCE_PATH.fullmatch(key) is not None


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings and lists by their path."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, (list, tuple)) and value:
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{path}[{index}]")]
    return [(path, list(value) if isinstance(value, tuple) else value)]
