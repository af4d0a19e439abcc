"""Which attention backends can run on a device, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache

import torch

from frozen_kernels.cpu_c.library import why_not_cpu_c

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKEND_NAMES = ("reference", "sdpa", "cpu_c", "xformers", "triton")
"""Attention backends, on every device."""


def unavailable_backends(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Return the backends that cannot run on a device in a dtype, each with a reason of one line.

    Args:
        device: device of qkv.
        dtype: float32, bfloat16 or float16; another dtype makes every backend unavailable.
    """
    device = torch.device(device)
    if dtype not in FLOAT_DTYPES:
        return dict.fromkeys(BACKEND_NAMES, f"no backend computes in {dtype}")
    reasons = {
        "cpu_c": _why_not_cpu_c(device),
        "xformers": _why_not_xformers(device, dtype),
        "triton": _why_not_triton(device, dtype),
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _why_not_cpu_c(device: torch.device) -> str:
    return why_not_cpu_c() if device.type == "cpu" else f"it is C for CPUs, and the device is {device.type}"


@torch.compiler.assume_constant_result
def _why_not_import(module: str) -> str:
    """Return why a module cannot be imported; empty if it can."""
    return _import_error(module)


@lru_cache
def _import_error(module: str) -> str:
    """_why_not_import, cached because fused ops call it every time."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation can raise anything
        return f"importing {module} fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _why_not_bf16(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU does not support bfloat16 (compute capability below 8.0)"
    return ""


def _why_not_xformers(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"memory_efficient_attention has no {device.type} operator, it needs a CUDA GPU"
    return _why_not_import("xformers.ops") or _why_not_bf16(device, dtype)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cpu" and not interpreted:
        return "Triton compiles for GPUs (TRITON_INTERPRET=1 interprets it on a CPU, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels are written for CUDA GPUs, and the device is {device.type}"
    return _why_not_import("triton") or _why_not_bf16(device, dtype)
