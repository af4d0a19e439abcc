"""Batch normalisation for layers that process several experts, or several pairs of experts, in one product.

Axis letters: B rows of the batch, G groups (pairs of experts), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import nn as distributed_functions
from torch.nn import functional as F

MOMENTUM = 0.1
EPS = 1e-5


class BatchNorm(nn.Module):
    """BatchNorm1d that can be applied to a part of its channels, or to several groups of one batch.

    In training on several processes the statistics are those of all ranks' rows, so that two processes equal one.

    Attributes:
        weight, bias: [C].
        running_mean, running_var: [C], used in eval mode.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BC: Tensor, start: int = 0) -> Tensor:
        """Normalise rows.

        Args:
            x_BC: [B, C], or fewer channels.
            start: index of x_BC's first channel among the module's channels.

        Returns:
            The same shape.
        """
        part = slice(start, start + x_BC.shape[1])
        weight, bias = self.weight[part], self.bias[part]
        mean, var = self.running_mean[part], self.running_var[part]
        if not self.training or _world_size() == 1:
            return F.batch_norm(x_BC, mean, var, weight, bias, self.training, MOMENTUM, EPS)
        x_fp32 = x_BC.float()  # autocast may have cast them to bf16
        batch_mean, batch_var, rows = _statistics_of_all_ranks(x_fp32)
        with torch.no_grad():
            mean.lerp_(batch_mean, MOMENTUM)
            var.lerp_(batch_var * (rows / (rows - 1)), MOMENTUM)
        return ((x_fp32 - batch_mean) * (batch_var + EPS).rsqrt() * weight + bias).to(x_BC.dtype)

    def grouped(self, x_BGC: Tensor) -> Tensor:
        """Normalise G groups with the same weights; in training, each group has its own statistics.

        The running statistics are updated as by G calls of forward, one per group.

        Args:
            x_BGC: [B, G, C].

        Returns:
            The same shape.
        """
        if not self.training:
            flat = x_BGC.reshape(-1, x_BGC.shape[2])
            out = F.batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, EPS)
            return out.view_as(x_BGC)
        groups = x_BGC.shape[1]
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        flat = x_BGC.flatten(1)
        if _world_size() == 1:
            out = F.batch_norm(flat, None, None, weight, bias, True, 0.0, EPS)
            with torch.no_grad():
                var, mean = torch.var_mean(flat.float(), dim=0)
        else:
            fp32 = flat.float()
            mean, biased, rows = _statistics_of_all_ranks(fp32)
            out = ((fp32 - mean) * (biased + EPS).rsqrt() * weight + bias).to(x_BGC.dtype)
            var = biased * (rows / (rows - 1))
        self._note(mean.detach().view(groups, -1), var.detach().view(groups, -1))
        return out.view_as(x_BGC)

    @torch.no_grad()
    def _note(self, mean_GC: Tensor, var_GC: Tensor) -> None:
        """Update the running statistics with those of each group, in order."""
        groups = len(mean_GC)
        after = torch.arange(groups - 1, -1, -1, device=mean_GC.device, dtype=mean_GC.dtype)
        share_G = MOMENTUM * (1 - MOMENTUM) ** after
        kept = (1 - MOMENTUM) ** groups
        self.running_mean.mul_(kept).add_(share_G @ mean_GC)
        self.running_var.mul_(kept).add_(share_G @ var_GC)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _statistics_of_all_ranks(x_BC: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance of the rows of all ranks, with gradient, and the number of rows."""
    rows = x_BC.shape[0]
    count = torch.tensor(float(rows), device=x_BC.device)
    torch.distributed.all_reduce(count)
    total = int(count)
    mean_C = distributed_functions.all_reduce(x_BC.sum(0)) / total
    var_C = distributed_functions.all_reduce((x_BC - mean_C).square().sum(0)) / total
    return mean_C, var_C, total
