"""Values of config keys that have another name now; the old ones are read with a warning."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

RENAMED_VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("model", "video", "attention"): {"native": "cpu_c", "batched": "cpu_c"},
}
"""Key -> old value -> the value that is used for it."""


def replace_renamed_values(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's plain values with every renamed value under its present name; the tree itself stays as it is."""
    for key, present in RENAMED_VALUES.items():
        value: Any = tree
        for name in key:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and value in present:
            logger.warning("%s=%s is an old name; %s is used", ".".join(key), value, present[value])
            tree = _replaced(tree, key, present[value])
    return tree


def _replaced(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    below = _replaced(tree[key[0]], key[1:], value) if len(key) > 1 else value
    return {**tree, key[0]: below}
