"""Metrics by name, with the direction in which each is better.

A metric family (an entry of frozen_fast.config.extensions.metrics) computes one or more numbers from a similarity
matrix and defines for each whether higher is better. evaluation.metrics names families, evaluation.keep_best a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from frozen_fast.config import extensions
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.evaluation.metrics import RECALL_AT, retrieval_metrics

VALIDATION_LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class MetricFamily:
    """Metrics that are computed together.

    Attributes:
        compute: (sim_QV, video_of_query) -> {name: value}.
        higher_is_better: name -> whether a higher value is better; its keys are all the names that compute returns.
    """

    compute: Callable[[Tensor, Sequence[int]], dict[str, float]]
    higher_is_better: dict[str, bool]


def _retrieval_directions() -> dict[str, bool]:
    names = {f"R@{k}": True for k in RECALL_AT} | {"Geom": True, "MdR": False, "MnR": False}
    return {f"{side}/{name}": higher for side in ("t2v", "v2t") for name, higher in names.items()}


RETRIEVAL = MetricFamily(compute=retrieval_metrics, higher_is_better=_retrieval_directions())


def compute_metrics(families: Sequence[str], sim_QV: Tensor, video_of_query: Sequence[int]) -> dict[str, float]:
    """Compute the metrics of several families.

    Raises:
        UserError: an unknown family, two families with the same metric name, or a metric without a direction.
    """
    found: dict[str, float] = {}
    for name in families:
        family: MetricFamily = extensions.metrics.load(name)
        values = family.compute(sim_QV, video_of_query)
        wrong = (values.keys() & found.keys()) | (values.keys() - family.higher_is_better.keys())
        if wrong:
            raise UserError(
                f"evaluation.metrics: got {name!r}, whose {sorted(wrong)[0]!r} has no direction or is another family's "
                "too; allowed: families whose numbers have names of their own and a direction each"
            )
        found.update(values)
    return found


def directions(families: Sequence[str]) -> dict[str, bool]:
    """Every metric that evaluation.keep_best may name, and the validation loss -> whether higher is better."""
    known = {VALIDATION_LOSS: False}
    for name in families:
        known.update(extensions.metrics.load(name).higher_is_better)
    return known


def check_metric(metric: str, known: Mapping[str, bool]) -> None:
    """Check that the metric of evaluation.keep_best is computed.

    Args:
        metric: its name; "none" is allowed.
        known: as directions returns it.

    Raises:
        UserError: naming the key.
    """
    if metric != "none" and metric not in known:
        raise unknown_name("evaluation.keep_best", metric, ["none", *known])


def is_better(metric: str, value: float, best: float | None, known: Mapping[str, bool]) -> bool:
    """Whether a value is better than the best so far (False for equal values)."""
    if best is None:
        return True
    return value > best if known[metric] else value < best
