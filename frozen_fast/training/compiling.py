"""torch.compile of the towers, and how often it had to compile."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from frozen_fast.models import DualEncoder

# A stage has a few shapes (sources, the last captions' lengths); beyond this many Dynamo would fall back to eager.
_RECOMPILE_LIMIT = 64


def compile_towers(model: DualEncoder) -> None:
    """Compile the video tower's blocks and the text tower in place; parameter names stay as they are."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for block in model.video_model.blocks:
        block.compile()
    model.text_model.compile(dynamic=True)


def forget_compiled() -> None:
    """Drop compiled code at a stage change: its shapes will not come again."""
    torch.compiler.reset()


def compiled_graphs() -> int:
    """Graphs compiled by this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules eagerly inside: evaluation has other shapes and is not worth compiling."""
    return torch.compiler.set_stance("force_eager")
