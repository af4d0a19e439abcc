"""torch.compile of the towers, with changes of stage, and the number of compiled graphs.

Blocks are compiled with static shapes, once for each shape in a stage (a source's batch size and frames). There are few
shapes, and static shapes compile faster and to faster kernels than dynamic ones. The text tower is compiled once with
dynamic shapes, because L changes from batch to batch. A change of stage drops the compiled code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import RetrievalModel

# A shape needs three graphs: first, middle and last blocks. Beyond the limit Dynamo falls back to eager mode.
_RECOMPILE_LIMIT = 64


def compile_towers(model: RetrievalModel, *, backend: str = "inductor") -> None:
    """Compile the video tower's blocks and the text tower in place; parameter names do not change.

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


def begin_stage(
    model: RetrievalModel, batch_sizes: Mapping[int, int], *, device: torch.device, precision: str, compiled: bool
) -> None:
    """Drop the compiled code of the previous stage, and choose the tower's kernels for this stage's shapes.

    Kernels are chosen before the first step because they cannot be measured under torch.compile, and so that they are
    measured with the stage's batch size and dtype.

    Args:
        model: the bare model.
        batch_sizes: frames -> clips of one forward pass on this rank.
        device: device of the model.
        precision: "bf16" or "fp32", the dtype of attention.
        compiled: compile_towers was called.
    """
    if compiled:
        torch.compiler.reset()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.choose_kernels(batch_sizes, device, dtype)


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules in eager mode in this context; evaluation has other shapes."""
    return torch.compiler.set_stance("force_eager")
