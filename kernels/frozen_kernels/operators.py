"""Registration of Python kernels as PyTorch operators, for torch.compile, fake tensors and profilers.

torch.library.custom_op does the same with 40 us more of Python per call: it checks every call for aliases and runs
derivatives through an autograd.Function of its own. A training step has some 150 of these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("frozen_kernels", "FRAGMENT")


def define_operator(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, dispatch_key: str = "CompositeExplicitAutograd"
) -> Callable[..., Any]:
    """Define the operator frozen_kernels::name. It has no derivative: an autograd.Function calls it and has one.

    Args:
        name: of the operator.
        kernel: computes it; the schema follows from its annotations. It must not change its arguments, nor return one
            of them or a view of one.
        fake: empty tensors of the shapes, dtypes and strides that the kernel returns.
        dispatch_key: where it runs; by default on every device.
    """
    _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    _LIBRARY.impl(name, torch.compiler.disable(kernel), dispatch_key)
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.frozen_kernels, name).default
    return operator
