"""Triton without a GPU: the interpreter in a process of its own, and the compiler for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(group: str) -> dict[str, Any]:
    """What support/interpreted_triton.py prints for a group of cases."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests")),
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "interpreted_triton.py"), group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


POINTERS = ("qkv", "out", "grad_out", "grad_qkv", "x", "branch", "weight", "bias", "total", "normed", "grad", "stream")
POINTERS += ("grad_stream", "grad_normed", "grad_branch", "branch_bias")
FP32_POINTERS = ("stats", "sums", "lse", "delta", "cls_lse", "cls_delta", "query_parts", "key_parts", "value_parts")
FP32_POINTERS += ("statistics", "weight_parts", "bias_parts", "branch_parts", "parts")


def compile_for_hopper(kernel: Any, dtype: str, constants: dict[str, int], warps: int) -> Any:
    """Machine code of a kernel for an H100/H200; needs no GPU, only the compiler that Triton brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, divisible = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        elif name in POINTERS or name in FP32_POINTERS:
            signature[name] = "*fp32" if name in FP32_POINTERS else f"*{dtype}"
            divisible[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name == "stride_b" else "i32"
    source = ASTSource(kernel, signature, constexprs=values, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
