"""Loss spikes: steps whose loss is far above those before, measured by median and median absolute deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WINDOW = 50
"""Losses before a step, of its source and stage, that it is compared with."""
LEAST_STEPS = 20
"""A step with fewer losses before it is not judged."""
DEVIATIONS = 6
"""Standard deviations above the median that make a spike."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SHARE = 0.01
"""A deviation counts as at least this share of the median: losses that hardly move have no spikes by chance."""

_BLOCK = 4096


@dataclass(frozen=True)
class Spike:
    """Neighbouring steps of one source above the limit.

    Attributes:
        step: the one with the highest loss.
        stage: its stage, from 0.
        source: its source.
        loss: its loss.
        median: of the losses before it.
        deviations: how many standard deviations it is above the median.
        steps: number of steps above the limit.
    """

    step: int
    stage: int
    source: str
    loss: float
    median: float
    deviations: float
    steps: int = 1


def loss_spikes(steps: Sequence[dict[str, Any]]) -> list[Spike]:
    """Find the spikes among the rows of steps.jsonl, in the order of their steps.

    Losses that rise to a new level are one spike, which ends when the window's median has followed.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in steps:
        if row["loss"] is not None:
            groups.setdefault((row["stage"], str(row["source"])), []).append(row)
    found: list[Spike] = []
    for (stage, source), rows in groups.items():
        losses_N = np.array([float(row["loss"]) for row in rows])
        median_N, deviation_N = _before(losses_N)
        previous = -2
        for index in np.flatnonzero(losses_N > median_N + DEVIATIONS * deviation_N).tolist():
            loss, median, deviation = (float(values[index]) for values in (losses_N, median_N, deviation_N))
            above = (loss - median) / deviation if deviation else float("inf")
            spike = Spike(int(rows[index]["step"]), stage, source, loss, median, above)
            if previous == index - 1:
                last = found.pop()
                higher = spike if spike.loss > last.loss else last
                spike = replace(higher, steps=last.steps + 1)
            found.append(spike)
            previous = index
    return sorted(found, key=lambda spike: spike.step)


def _before(losses_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation of the losses before each; infinite where there are too few."""
    median_N, deviation_N = np.full(len(losses_N), np.inf), np.zeros(len(losses_N))
    bounds = [(index, index + 1) for index in range(LEAST_STEPS, min(WINDOW, len(losses_N)))]
    bounds += [(first, first + _BLOCK) for first in range(WINDOW, len(losses_N), _BLOCK)]
    for first, last in bounds:
        before = losses_N[max(0, first - WINDOW) : min(last, len(losses_N)) - 1]
        windows_KW = np.lib.stride_tricks.sliding_window_view(before, min(WINDOW, first))
        median_K = np.median(windows_KW, axis=1)
        spread_K = np.median(np.abs(windows_KW - median_K[:, None]), axis=1)
        median_N[first:last] = median_K
        deviation_N[first:last] = np.maximum(_NORMAL * spread_K, _LEAST_SHARE * np.abs(median_K))
    return median_N, deviation_N
