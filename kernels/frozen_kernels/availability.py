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
    reasons = {name: why_not(name, device, dtype) for name in BACKEND_NAMES}
    return {name: reason for name, reason in reasons.items() if reason}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why one of BACKEND_NAMES cannot run on a device in a dtype; empty if it can. Cheap: ops ask in every call."""
    if dtype not in FLOAT_DTYPES:
        return f"no backend computes in {dtype}"
    if name == "cpu_c":
        return why_not_cpu_c() if device.type == "cpu" else f"it is C for CPUs, and the device is {device.type}"
    if name == "xformers":
        return _why_not_xformers(device, dtype)
    return _why_not_triton(device, dtype) if name == "triton" else ""


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


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """A CUDA device's compute capability, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _why_not_bf16(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16 and device.type == "cuda" and compute_capability(device) < (8, 0):
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
