"""The linear head: the minimum of its objective, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from frozen_fast.errors import UserError
from frozen_fast.evaluation.classification import classify
from frozen_fast.evaluation.linear_head import fit_linear_head


def blobs(clips: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Three classes around points far apart, and a feature that is the same for all."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (clips,), generator=generator)
    centres = 3 * torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    noise = torch.randn(clips, 4, generator=generator)
    noise[:, 3] = 0
    return centres[classes] + noise * 0.3 + 5, classes.tolist()


def test_it_is_the_minimum_of_the_objective() -> None:
    features, classes = blobs(60, 0)
    head = fit_linear_head(features, classes, 4, label_smoothing=0.1, weight_decay=0.01)
    weight, bias = head.weight_CD.clone().requires_grad_(), head.bias_C.clone().requires_grad_()
    standard = (features.double() - features.double().mean(0)) / head.scale_D
    assert standard.std(0, correction=0)[:3] == pytest.approx([1.0] * 3) and not standard[:, 3].any()
    logits = standard @ weight.T + bias
    targets = torch.full((60, 4), 0.1 / 4, dtype=torch.float64)
    targets[torch.arange(60), torch.tensor(classes)] += 0.9
    value = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean() + 0.005 * weight.square().sum()
    value.backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) < 1e-4
    assert torch.allclose(head.logits(features).T, logits.detach())


def test_it_classifies_other_clips() -> None:
    head = fit_linear_head(*blobs(60, 0), 3, label_smoothing=0.1, weight_decay=0.01)
    features, classes = blobs(40, 1)
    assert classify(head.logits(features), classes, ("a", "b", "c")).top1 > 97


@pytest.mark.parametrize(
    ("features", "classes", "message"),
    [
        (torch.zeros(2, 3), [0], "for each clip"),
        (torch.zeros(0, 3), [], "N >= 1"),
        (torch.zeros(1, 3), [2], "in range"),
        (torch.full((1, 3), torch.inf), [0], "not finite"),
    ],
)
def test_it_refuses(features: torch.Tensor, classes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_linear_head(features, classes, 2, label_smoothing=0.0, weight_decay=0.1)
