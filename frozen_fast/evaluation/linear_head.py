"""Multinomial logistic regression on a frozen model's features: a linear head for action recognition.

Axis letters: N training clips, V clips, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.errors import UserError

MAX_ITERATIONS = 500
TOLERANCE = 1e-7


@dataclass(frozen=True)
class LinearHead:
    """Standardises features and maps them to classes.

    Attributes:
        mean_D: of the training features.
        scale_D: standard deviation of the training features; 1 where it is 0.
        weight_CD: of the layer.
        bias_C: of the layer.
    """

    mean_D: Tensor
    scale_D: Tensor
    weight_CD: Tensor
    bias_C: Tensor

    def logits(self, features_VD: Tensor) -> Tensor:
        """Logits [C, V], fp64."""
        standard_VD = (features_VD.double() - self.mean_D) / self.scale_D
        return (standard_VD @ self.weight_CD.T + self.bias_C).T


def fit_linear_head(
    features_ND: Tensor, class_of_clip: Sequence[int], num_classes: int, *, label_smoothing: float, weight_decay: float
) -> LinearHead:
    """Fit the layer that minimises mean cross-entropy plus weight_decay / 2 times the squared norm of its weights.

    The problem is convex. L-BFGS in fp64 from zero weights gives the same layer on every machine.

    Args:
        features_ND: of the training clips.
        class_of_clip: the class of each.
        num_classes: C, including classes without training clips.
        label_smoothing: share of the target that is distributed over all classes.
        weight_decay: above 0; separable classes have no finite solution otherwise.

    Raises:
        UserError: no clips, features that are not finite, or inconsistent sizes or classes.
    """
    target_N = torch.as_tensor(class_of_clip, dtype=torch.int64)
    in_range = len(target_N) > 0 and 0 <= int(target_N.min()) <= int(target_N.max()) < num_classes
    if features_ND.ndim != 2 or len(features_ND) != len(target_N) or not in_range:
        got = f"features {list(features_ND.shape)} and {len(target_N)} classes of {num_classes}"
        raise UserError(f"linear head: got {got}; allowed: [N, D] with N >= 1 and a class in range for each clip")
    if not bool(torch.isfinite(features_ND).all()):
        raise UserError("linear head: got features that are not finite; allowed: numbers")
    features_ND = features_ND.double()
    mean_D = features_ND.mean(0)
    scale_D = features_ND.std(0, correction=0)
    scale_D = torch.where(scale_D > 0, scale_D, torch.ones_like(scale_D))
    standard_ND = (features_ND - mean_D) / scale_D
    weight_CD = torch.zeros(num_classes, features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C], max_iter=MAX_ITERATIONS, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits_NC = standard_ND @ weight_CD.T + bias_C
        value = F.cross_entropy(logits_NC, target_N, label_smoothing=label_smoothing)
        value = value + 0.5 * weight_decay * weight_CD.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearHead(mean_D, scale_D, weight_CD.detach(), bias_C.detach())
