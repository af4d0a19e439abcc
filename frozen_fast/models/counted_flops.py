"""FLOPs of a forward pass, counted by PyTorch on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frozen_fast.errors import reason

log = logging.getLogger(__name__)


def counted_flops(
    build: Callable[[], nn.Module], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> float | None:
    """Count the FLOPs of the matrix products and convolutions of a forward pass (a multiply-add counts as 2).

    Args:
        build: builds the module; called on the meta device.
        shapes: shapes of its inputs.
        dtype: dtype of its inputs.

    Returns:
        FLOPs, or None (with a log message) for a module that cannot run on the meta device.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            module = build().eval()
            inputs = [torch.zeros(shape, dtype=dtype) for shape in shapes]
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
        return float(counter.get_total_flops())
    except Exception as error:  # plugin code can raise anything: training continues without FLOPs
        log.warning("no FLOPs and no MFU: %s cannot be counted (%s)", build, reason(error))
        return None
