"""Ranks and small collectives. Without torch.distributed the world size is 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group with more than one rank is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without gradient, on every rank."""
    mean = value.detach().clone()
    if is_distributed():
        dist.all_reduce(mean)
        mean /= world_size()
    return mean


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Every rank's count in rank order; a small collective that reads its result back to the host."""
    if not is_distributed():
        return [count]
    own = torch.tensor([count], dtype=torch.int64, device=device)
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, own)
    return [int(value) for value in counts.tolist()]


def refuse_other_counts(count: int, device: torch.device) -> None:
    """Check on the device, asynchronously, that all ranks have the same count; a difference fails an assertion.

    Every rank takes part in every call, so that the collective matches on all ranks.
    """
    own = torch.tensor([count], dtype=torch.int64).to(device, non_blocking=True)
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, own)
    torch._assert_async((counts == own).all(), "clips per rank: got different numbers; allowed: the same on each rank")


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the backward pass sums all ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, dtype: torch.dtype | None) -> Tensor:
        sent = rows_BD.to(dtype or rows_BD.dtype).contiguous()
        gathered = sent.new_empty(world_size() * sent.shape[0], *sent.shape[1:])
        dist.all_gather_into_tensor(gathered, sent)
        return gathered.to(rows_BD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        rows = gradient.shape[0] // world_size()
        if gradient.device.type == "cpu":
            # gloo has no reduce_scatter: reduce everything and take this rank's part.
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            return gradient[rank() * rows : (rank() + 1) * rows], None
        own = gradient.new_empty(rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient)
        return own, None


def gather_with_gradient(rows_BD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate every rank's rows in rank order; the gradient flows back to the rank that owns a row.

    Args:
        rows_BD: this rank's rows [B, D]; B must be equal on all ranks (the caller checks).
        dtype: dtype that the rows are rounded to and sent in; None: their own.

    Returns:
        [world_size * B, D] in the dtype of rows_BD. The backward pass sums the gradients that all ranks hold for a row,
        unlike a gather whose backward slices the local gradient (which is too small by a factor of world_size).
    """
    return _GatherRows.apply(rows_BD, dtype) if is_distributed() else rows_BD
