"""Which process this is, and what the others hold. Works without torch.distributed: a world of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
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


def gather_with_gradient(rows_BD: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order; the gradient flows back to the rank that owns a row.

    Args:
        rows_BD: this rank's rows [B, D]; B must be equal on all ranks.

    Returns:
        [world_size * B, D]. The backward pass sums the gradients that all ranks hold for a row,
        which the usual gather with a sliced backward does not (it loses a factor of world_size).
    """
    if not is_distributed():
        return rows_BD
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows_BD.contiguous()), dim=0)
