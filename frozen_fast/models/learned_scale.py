"""The learned scale (and bias) of similarities in the loss, as in CLIP and SigLIP."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Ceiling(torch.autograd.Function):
    """min(x, ceiling); at the ceiling the gradient passes only if a descent step lowers x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.above = x >= ceiling
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return torch.where(ctx.above & (gradient < 0), torch.zeros_like(gradient), gradient), None


def with_ceiling(x: Tensor, ceiling: float) -> Tensor:
    """Return min(x, ceiling). Unlike a clamp, whose gradient is 0, x can decrease again from the ceiling."""
    return _Ceiling.apply(x, ceiling)


class LearnedScale(nn.Module):
    """exp(logit_scale) multiplies the similarities in the loss, logit_bias is added.

    Both have one axis of length 1, because FSDP2 cannot shard scalars.
    """

    def __init__(self, scale: float, *, max_scale: float, bias: float | None = None) -> None:
        """Initialise with a scale.

        Args:
            scale: 1 / temperature, above 0.
            max_scale: largest scale (CLIP: 100).
            bias: SigLIP's; None: no bias.
        """
        super().__init__()
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> dict[str, Tensor]:
        """Return {"logit_scale", and "logit_bias" if there is one}, each [1]; logit_scale is at most log(max_scale)."""
        scale = {"logit_scale": with_ceiling(self.logit_scale, math.log(self.max_scale))}
        return scale if self.logit_bias is None else {**scale, "logit_bias": self.logit_bias}

    def settings(self) -> dict[str, Any]:
        """Return its entry in a checkpoint's config.json."""
        return {"max_scale": self.max_scale, "bias": self.logit_bias is not None}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> LearnedScale:
        """Build the module from settings(), before weights are loaded."""
        return cls(1.0, max_scale=float(settings["max_scale"]), bias=0.0 if settings["bias"] else None)
