"""Ranger against its equations, one number at a time, and the learning rate that falls after each epoch."""

from __future__ import annotations

import math

import pytest
import torch

from frozen_fast.config.schema import OptimizerConfig
from frozen_fast.optimizers import learning_rate_factor
from frozen_fast.optimizers.ranger import Ranger


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


def test_ranger_follows_its_equations() -> None:
    gradients = [math.sin(step) + 0.3 for step in range(20)]
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Ranger([weight], lr=0.05, weight_decay=0.01)
    path = []
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        path.append(float(weight))
    assert path == pytest.approx(plain_ranger(2.0, gradients, 0.05, 0.01), rel=1e-9)


def test_the_rate_falls_after_each_epoch() -> None:
    config = OptimizerConfig(schedule="epoch_decay", epoch_factor=0.5)
    factors = [learning_rate_factor(step, 100, config, epoch_steps=2.5) for step in range(1, 9)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
