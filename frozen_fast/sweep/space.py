"""The trials of a sweep: the product of its axes, listed trials, or a random part. Pure functions."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACCELERATE_AXIS = "accelerate"
ENVIRONMENT_PREFIX = "environment."
TOGETHER_PREFIX = "together."


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space.

    Attributes:
        settings: config key -> value; the key "accelerate" names an Accelerate config file, and environment.NAME sets
            an environment variable.
    """

    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """A short name that depends on the settings only, so that a resumed sweep finds its results."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return digest[:10]

    @property
    def accelerate(self) -> str | None:
        """The Accelerate config file of this trial, or None for the sweep's own."""
        return dict(self.settings).get(ACCELERATE_AXIS)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that this trial sets."""
        start = len(ENVIRONMENT_PREFIX)
        return {key[start:]: str(value) for key, value in self.settings if key.startswith(ENVIRONMENT_PREFIX)}

    def overrides(self) -> list[str]:
        """The settings as `key.path=value` arguments of train.py (values as JSON, which YAML reads)."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings if _is_config_key(key)]

    def label(self) -> str:
        """The settings in one line for tables, keys shortened to their last part (and the list item it belongs to)."""
        parts = []
        for key, value in self.settings:
            shown = str(value).rsplit("/", 1)[-1].removesuffix(".yaml") if key == ACCELERATE_AXIS else value
            parts.append(f"{_short(key)}={shown}")
        return " ".join(parts) or "(as configured)"


def _is_config_key(key: str) -> bool:
    return key != ACCELERATE_AXIS and not key.startswith(ENVIRONMENT_PREFIX)


def _short(key: str) -> str:
    *above, last = key.split(".")
    return f"{above[-1]}.{last}" if above and above[-1].endswith("]") else last


def enumerate_trials(axes: Mapping[str, Sequence[Any]], listed: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """All trials: the full product of the axes, then the listed ones; duplicates once, in a stable order.

    Args:
        axes: config key -> values to try. Empty: no product. A value of an axis together.NAME is a mapping of several
            settings that change together; its name is for the reader.
        listed: settings of further single trials.
    """
    points: list[Mapping[str, Any]] = []
    if axes:
        points.extend(_point(list(axes), values) for values in itertools.product(*axes.values()))
    points.extend(listed)
    trials = [Trial(settings=tuple(sorted(point.items()))) for point in points]
    unique = {trial.name: trial for trial in trials}
    return list(unique.values())


def _point(keys: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for key, value in zip(keys, values, strict=True):
        point.update(value if key.startswith(TOGETHER_PREFIX) else {key: value})
    return point


def draw_trials(trials: Sequence[Trial], max_trials: int, seed: int) -> list[Trial]:
    """At most `max_trials` of the trials (0: all), drawn without replacement, kept in their order."""
    if max_trials <= 0 or max_trials >= len(trials):
        return list(trials)
    chosen = sorted(random.Random(seed).sample(range(len(trials)), max_trials))
    return [trials[index] for index in chosen]


def survivors(scores: Mapping[str, float | None], keep_share: float) -> list[str]:
    """Trials that advance to the next rung of successive halving: the best share, at least one, no failures.

    Args:
        scores: trial name -> objective (higher is better), None where the trial failed.
        keep_share: share of the trials of this rung that go on, in (0, 1).
    """
    ranked = sorted(
        (name for name, score in scores.items() if score is not None), key=lambda name: -(scores[name] or 0)
    )
    if not ranked:
        return []
    return ranked[: max(1, round(len(scores) * keep_share))]
