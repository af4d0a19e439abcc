"""torch.compile of the towers, across stage changes, and the number of compiled graphs.

A block is compiled for each shape a stage has (a source's batch and frames), with sizes fixed: shapes are few, and
fixed sizes make faster kernels and compile sooner than symbolic ones. The text tower is compiled once with symbolic
sizes, because the longest caption, and with it L, changes from batch to batch. A stage change drops what was compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import RetrievalModel

# A shape takes three graphs: first block, those between, last block. Beyond the limit Dynamo falls back to eager.
_RECOMPILE_LIMIT = 64


def compile_towers(model: RetrievalModel, *, backend: str = "inductor") -> None:
    """Compile the video side's blocks and the text tower in place; parameter names stay as they are.

    Raises:
        UserError: the model has no such towers.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    fixed, changing = model.compiled_parts()
    if not fixed and not changing:
        raise UserError(f"training.compile: got true for a model of kind {model.kind}; allowed: false")
    for modules, dynamic in ((fixed, False), (changing, True)):
        for module in modules:
            module.compile(dynamic=dynamic, backend=backend)


def begin_stage(model: RetrievalModel, batch_sizes: Mapping[int, int], *, device: torch.device, precision: str) -> None:
    """Drop the code compiled for another stage's shapes and let the tower choose its kernels for this stage's.

    Under torch.compile nothing can be measured, so the choice must stand before the first step.

    Args:
        model: its towers compiled.
        batch_sizes: frames -> clips of one forward pass on this rank.
        device: where it runs.
        precision: "bf16" or "fp32", the dtype of attention.
    """
    torch.compiler.reset()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.choose_kernels(batch_sizes, device, dtype)


def compiled_graphs() -> int:
    """Graphs compiled by this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules eagerly inside: evaluation has other shapes and is not worth compiling."""
    return torch.compiler.set_stance("force_eager")
