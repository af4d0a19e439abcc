"""C form of frozen_kernels.fused.bias_gelu, for CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from frozen_kernels.cpu_c.library import KINDS, in_parallel, load_kernels
from frozen_kernels.fused.forms import APPROXIMATE

TASKS = 32
"""Number of parts of the rows in the backward pass; each part has its own sum of the bias's gradient."""


def launch_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    library = load_kernels("bias_gelu.c", {"KIND": KINDS[x.dtype], "APPROXIMATE": APPROXIMATE[approximate]})
    width = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    in_parallel(library.bias_gelu_forward, x.numel() // width, ctypes.c_long(width), x, bias.float().contiguous(), out)
    return out


def launch_backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and the bias; the latter is added over the parts in a fixed order."""
    library = load_kernels("bias_gelu.c", {"KIND": KINDS[x.dtype], "APPROXIMATE": APPROXIMATE[approximate]})
    width = x.shape[-1]
    rows = x.numel() // width
    x, grad_out = x.contiguous(), grad_out.contiguous()
    grad = torch.empty_like(x)
    tasks = max(1, min(TASKS, rows))
    parts = torch.empty(tasks, width)
    sizes = [ctypes.c_long(size) for size in (rows, width)]
    in_parallel(library.bias_gelu_backward, tasks, *sizes, grad_out, x, bias.float().contiguous(), grad, parts)
    return grad, parts.sum(dim=0).to(bias.dtype)
