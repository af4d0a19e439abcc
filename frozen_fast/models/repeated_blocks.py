"""A module's repeated blocks, and activation checkpointing of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from frozen_fast.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the items of a module's lists and sequences that have weights and submodules, in order.

    Single layers are excluded. Nested containers are expanded (the stages of a ResNet or a Swin transformer), but not
    the lists inside a block (the two halves of a T5 block).
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) or type(child) is nn.Sequential:
            found += _blocks_of(child)
        else:
            found += find_repeated_blocks(child)
    return found


def _blocks_of(container: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for item in container.children():
        if type(item) in _CONTAINERS:
            found += _blocks_of(item)
        elif next(item.parameters(), None) is not None and next(item.children(), None) is not None:
            found.append(item)
    return found


class _Recomputed:
    """Mixin for a block's class that repeats its forward pass in the backward pass."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return plain(*inputs, **options)
        return checkpoint(plain, *inputs, use_reentrant=False, **options)


def recompute_blocks(blocks: Sequence[nn.Module], count: int) -> None:
    """Enable activation checkpointing in the first blocks; parameter names do not change.

    A block with running averages (BatchNorm) updates them twice per batch.

    Args:
        blocks: the tower's blocks.
        count: number of blocks.

    Raises:
        UserError: the tower has fewer blocks.
    """
    if not 0 <= count <= len(blocks):
        allowed = f"0 to {len(blocks)}, the tower's blocks"
        raise UserError(f"model.video.checkpointed_blocks: got {count}; allowed: {allowed}")
    for block in blocks[:count]:
        plain = type(block)
        block.__class__ = type(f"Recomputed{plain.__name__}", (_Recomputed, plain), {})
