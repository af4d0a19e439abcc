"""Gated embedding units of all experts at once (Miech et al. 2018), and the collaborative gate of Liu et al. 2019.

Axis letters: B rows (captions or videos), M experts, N the experts of a pair's other side, D width of an expert's
space, W = sum of the widths of all experts' spaces (M x D where they are equal).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.models.experts.batch_norm import BatchNorm

PAIR_EPS = 1e-11
"""Added to the number of available pairs before the division (the released code's)."""


class BlockLinear(nn.Module):
    """One square linear layer per expert: y_m = W_m x_m + b_m, in one batched product if the widths are equal.

    Attributes:
        weight: [M, D, D]; replaced by the list `weights` of [D_m, D_m] if the widths differ.
        bias: [W].
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.equal = len(set(widths)) == 1
        blocks = [_drawn(width, width) for width in widths]
        if self.equal:
            self.weight = nn.Parameter(torch.stack(blocks))
        else:
            self.weights = nn.ParameterList(blocks)
        self.bias = nn.Parameter(torch.cat([_drawn(width, fan_in=width) for width in widths]))

    def forward(self, x_BW: Tensor) -> Tensor:
        """Apply every expert's layer: [B, W] -> [B, W]."""
        if self.equal:
            x_MBD = x_BW.view(len(x_BW), len(self.widths), -1).transpose(0, 1)
            product = torch.bmm(x_MBD, self.weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        else:
            parts = x_BW.split(self.widths, dim=1)
            product = torch.cat([F.linear(x, weight) for x, weight in zip(parts, self.weights, strict=True)], dim=1)
        return product + self.bias


class ContextGate(nn.Module):
    """Context gating of every expert's vector: l2(x * sigmoid(BN(F x + f)))."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.linear = BlockLinear(widths)
        self.norm = BatchNorm(sum(widths))

    def forward(self, x_BW: Tensor) -> Tensor:
        """[B, W] -> [B, W], each expert's part of length 1."""
        gated = x_BW * self.norm(self.linear(x_BW)).sigmoid()
        return normalise_parts(gated, self.linear.widths)


class CollaborativeGate(nn.Module):
    """Gates every expert's vector by its pairs with all available experts (equations 2 to 5 of the paper).

    For each expert m, t_m is the mean of G([p_m; p_n]) over the available n (including m), where G is a linear layer 2D
    -> D followed by two times (batch norm, Mish, linear layer). Then p_m becomes l2(p_m * sigmoid(BN1(t_m) + BN2(F_m
    p_m + f_m))). Released models process the experts in order, so that later experts use gated earlier ones. In
    parallel mode, all experts use the input vectors.

    For speed, the first layer is applied once to each side instead of to each pair, and the last layer, which is
    linear, to t_m instead of to its summands.
    """

    def __init__(self, num_experts: int, width: int, *, in_order: bool) -> None:
        super().__init__()
        self.num_experts, self.width, self.in_order = num_experts, width, in_order
        self.pair_linear = nn.Linear(2 * width, width)
        self.pair_norms = nn.ModuleList(BatchNorm(width) for _ in range(2))
        self.shared_linear = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.linear = BlockLinear([width] * num_experts)
        self.pair_gate_norm = BatchNorm(num_experts * width)
        self.own_gate_norm = BatchNorm(num_experts * width)

    def forward(self, x_BMD: Tensor, available_BM: Tensor) -> Tensor:
        """Gate the experts' vectors.

        Args:
            x_BMD: [B, M, D], L2-normalised.
            available_BM: 1 if the video has the expert, otherwise 0.

        Returns:
            [B, M, D], L2-normalised.
        """
        own_BMD = self.own_gate_norm(self.linear(x_BMD.flatten(1))).view_as(x_BMD)
        first_weight, second_weight = self.pair_linear.weight.split(self.width, dim=1)
        first_BMD = F.linear(x_BMD, first_weight, self.pair_linear.bias)
        second_BND = F.linear(x_BMD, second_weight)
        if not self.in_order:
            hidden = (first_BMD[:, :, None] + second_BND[:, None]).flatten(1, 2)
            share_BMN = _shares(available_BM[:, :, None] * available_BM[:, None])
            reasons_BMD = self._reason(hidden, share_BMN)
            gates = (self.pair_gate_norm(reasons_BMD.flatten(1)).view_as(x_BMD) + own_BMD).sigmoid()
            return F.normalize(x_BMD * gates, dim=2)
        seen, gated = list(second_BND.unbind(1)), []
        for m in range(self.num_experts):
            share_B1N = _shares(available_BM[:, m : m + 1] * available_BM)[:, None]
            reason_BD = self._reason(first_BMD[:, m : m + 1] + torch.stack(seen, dim=1), share_B1N)[:, 0]
            gate_BD = (self.pair_gate_norm(reason_BD, m * self.width) + own_BMD[:, m]).sigmoid()
            gated.append(F.normalize(x_BMD[:, m] * gate_BD, dim=1))
            seen[m] = F.linear(gated[m], second_weight)
        return torch.stack(gated, dim=1)

    def _reason(self, hidden_BPD: Tensor, share_BMN: Tensor) -> Tensor:
        """Compute the remaining layers of G for P = M x N pairs, and the weighted mean over N: [B, M, D]."""
        first_norm, second_norm = (cast(BatchNorm, norm) for norm in self.pair_norms)
        hidden = self.shared_linear[0](F.mish(first_norm.grouped(hidden_BPD)))
        hidden = F.mish(second_norm.grouped(hidden))
        hidden_BMND = hidden.view(*share_BMN.shape, self.width)
        mean_BMD = torch.einsum("bmn,bmnd->bmd", share_BMN, hidden_BMND)
        last = cast(nn.Linear, self.shared_linear[1])
        return F.linear(mean_BMD, last.weight) + last.bias * share_BMN.sum(2, keepdim=True)


def normalise_parts(x_BW: Tensor, widths: Sequence[int]) -> Tensor:
    """L2-normalise each expert's part of the rows."""
    if len(set(widths)) == 1:
        return F.normalize(x_BW.view(len(x_BW), len(widths), -1), dim=2).flatten(1)
    return torch.cat([F.normalize(part, dim=1) for part in x_BW.split(tuple(widths), dim=1)], dim=1)


def _shares(available_BxN: Tensor) -> Tensor:
    """Return the weights of the mean over the available pairs of the last axis; all 0 if there are none."""
    return available_BxN / (available_BxN.sum(-1, keepdim=True) + PAIR_EPS)


def _drawn(*shape: int, fan_in: int | None = None) -> Tensor:
    """Initialise weights as nn.Linear does."""
    bound = 1 / math.sqrt(shape[-1] if fan_in is None else fan_in)
    return torch.empty(*shape).uniform_(-bound, bound)
