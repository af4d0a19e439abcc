"""Run the Triton kernels in Triton's interpreter and print their errors as JSON; started by the unit tests.

The interpreter is chosen when the kernels are imported, so this is a process of its own:
TRITON_INTERPRET=1 python interpreted_triton.py attention|fused|loss_curve.
"""

from __future__ import annotations

import json
import sys

import torch

from frozen_kernels import divided_attention
from frozen_kernels.attention import triton
from frozen_kernels.attention.tiles import Tile, forced
from support.attention_cases import errors, make_case, run
from support.fused_cases import FUSED_CASES, fused_errors
from support.loss_curves import INTERPRETED, loss_curve

ATTENTION_CASES = [
    # axis, dtype, batch, frames, patches, heads, head width, strided
    ("time", "float32", 2, 1, 1, 1, 16, False),
    ("time", "float32", 2, 1, 7, 3, 5, True),
    ("time", "bfloat16", 1, 1, 196, 1, 64, False),
    ("time", "float16", 1, 1, 7, 2, 24, False),
    ("time", "float32", 1, 2, 196, 1, 16, False),
    ("time", "float32", 2, 3, 7, 3, 17, True),
    ("time", "bfloat16", 1, 4, 7, 2, 128, False),
    ("time", "float16", 1, 8, 7, 1, 33, False),
    ("time", "float32", 1, 16, 1, 2, 64, False),
    ("time", "float32", 1, 16, 7, 1, 16, False),
    ("space", "float32", 2, 1, 1, 1, 16, False),
    ("space", "float32", 2, 1, 7, 3, 5, True),
    ("space", "bfloat16", 1, 1, 196, 1, 64, False),
    ("space", "float32", 1, 2, 196, 1, 16, False),
    ("space", "float32", 1, 3, 7, 2, 17, True),
    ("space", "float16", 1, 4, 7, 1, 24, False),
    ("space", "bfloat16", 1, 8, 7, 1, 80, False),
    ("space", "float32", 1, 16, 1, 1, 128, False),
]


def case_errors(axis, dtype, batch, frames, patches, heads, width, strided):
    """Errors of one case; strided: qkv is every second element of something larger, axes in another order."""
    qkv, grad = make_case(batch, frames, patches, heads, width)
    qkv = qkv.to(getattr(torch, dtype))
    if strided:
        wide = torch.zeros(3, heads, batch, 1 + frames * patches, 2 * width, dtype=qkv.dtype)
        view = wide.permute(2, 3, 0, 1, 4)[..., ::2]
        view.copy_(qkv)
        qkv = view
    return errors(lambda x: divided_attention(x, frames, axis, backend="triton"), qkv, grad, frames, axis)


def order_of_programs(axis):
    """Whether a run in small tiles repeats bit for bit, and how far it is from the run in usual tiles."""
    qkv, grad = make_case(1, 2, 20, 1, 16)

    def compute(x):
        return divided_attention(x, 2, axis, backend="triton")

    usual = run(compute, qkv, grad)
    small = Tile(4, 0, 4, 1) if axis == "time" else Tile(16, 16, 8, 3)
    with forced(axis, "forward", small), forced(axis, "backward", small):
        first, second = run(compute, qkv, grad), run(compute, qkv, grad)
    return {
        "repeats": all(torch.equal(first[name], second[name]) for name in first),
        "apart": max((first[name] - usual[name]).abs().max().item() for name in first),
    }


def main(group: str) -> None:
    """Print one JSON object: the errors by case, and for attention the order check by axis."""
    if group == "fused":
        result = {"-".join(map(str, case)): fused_errors(*case) for case in FUSED_CASES}
    elif group == "loss_curve":
        result = {"losses": loss_curve("triton", "plain", INTERPRETED)}
    else:
        cases = {"-".join(map(str, case)): case_errors(*case) for case in ATTENTION_CASES}
        order = {axis: order_of_programs(axis) for axis in ("time", "space")}
        result = {"cases": cases, "order": order}
    json.dump({"interpreted": triton.INTERPRETED, **result}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
