"""A module's repeated blocks, and recomputing the activations of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from frozen_fast.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The items of a module's lists and sequences that hold weights and parts of their own, in order.

    Single layers are left out, containers of containers are opened (the stages of a ResNet or a Swin transformer), and
    a block's own lists are not (the two halves of a T5 block).
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
    """Mixed in before a block's class: its forward pass is run again in the backward pass."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return plain(*inputs, **options)
        return checkpoint(plain, *inputs, use_reentrant=False, **options)


def recompute_blocks(blocks: Sequence[nn.Module], count: int) -> None:
    """Let the first blocks recompute their activations; names of parameters stay as they are.

    A block that keeps running averages (BatchNorm) counts a batch twice in them.

    Args:
        blocks: the tower's.
        count: how many of them.

    Raises:
        UserError: more than there are.
    """
    if not 0 <= count <= len(blocks):
        allowed = f"0 to {len(blocks)}, the tower's blocks"
        raise UserError(f"model.video.checkpointed_blocks: got {count}; allowed: {allowed}")
    for block in blocks[:count]:
        plain = type(block)
        block.__class__ = type(f"Recomputed{plain.__name__}", (_Recomputed, plain), {})
