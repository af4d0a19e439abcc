"""Ranger against its equations, one number at a time, and the learning rate that falls after each epoch."""

from __future__ import annotations

import math

import pytest
import torch

from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.optimizers import learning_rate_factor
from frozen_fast.optimizers.ranger import Ranger
from frozen_fast.optimizers.rectified_adam import RectifiedAdam


def plain_ranger(start: float, gradients: list[float], rate: float, decay: float) -> list[float]:
    """Rectified Adam, decoupled decay, and half the way from the slow weight at every sixth step."""
    first, second, eps = 0.95, 0.999, 1e-5
    longest = 2 / (1 - second) - 1
    weight = slow = start
    mean = square = 0.0
    path = []
    for step, gradient in enumerate(gradients, start=1):
        square = second * square + (1 - second) * gradient**2
        mean = first * mean + (1 - first) * gradient
        weight -= rate * decay * weight
        length = longest - 2 * step * second**step / (1 - second**step)
        if length > 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            size = math.sqrt((1 - second**step) * ratio) / (1 - first**step)
            weight -= rate * size * mean / (math.sqrt(square) + eps)
        else:
            weight -= rate * mean / (1 - first**step)
        if step % 6 == 0:
            weight = slow = slow + 0.5 * (weight - slow)
        path.append(weight)
    return path


@pytest.mark.parametrize("fused", [False, True])
def test_ranger_follows_its_equations(fused: bool) -> None:
    gradients = [math.sin(step) + 0.3 for step in range(20)]
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Ranger([weight], lr=0.05, weight_decay=0.01, fused=fused)
    path = []
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        path.append(float(weight))
    assert path == pytest.approx(plain_ranger(2.0, gradients, 0.05, 0.01), rel=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_rectified_adam_is_that_of_torch(fused: bool) -> None:
    """Two parameters, one of which misses the first steps, so that their step counts differ."""
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(11)]
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in start] for _ in range(2))
    settings = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    optimizers = (
        RectifiedAdam(ours, fused=fused, **settings),
        torch.optim.RAdam(theirs, decoupled_weight_decay=True, **settings),
    )
    for step in range(15):
        gradients = [torch.randn_like(one) for one in start]
        for parameters in (ours, theirs):
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                parameter.grad = None if number == 1 and step < 3 else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    assert [int(optimizers[0].state[one]["step"]) for one in ours] == [15, 12]


def test_the_rate_falls_after_each_epoch() -> None:
    config = OptimizerConfig(schedule="epoch_decay", epoch_factor=0.5)
    factors = [learning_rate_factor(step, 100, config, epoch_steps=2.5) for step in range(1, 9)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
