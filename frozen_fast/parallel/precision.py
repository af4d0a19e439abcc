"""Selection of training.precision for a device."""

from __future__ import annotations

import logging

import torch

from frozen_fast.errors import UserError

logger = logging.getLogger(__name__)


def bf16_hardware(device: torch.device) -> str | None:
    """The device's bf16 hardware; None if bf16 is emulated."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"CUDA compute capability {major}.{minor}" if major >= 8 else None
    if torch.cpu._is_amx_tile_supported():
        return "CPU with AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "CPU with AVX-512 BF16"
    return None


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """Resolve training.precision; bf16 on a device that emulates it is used with a warning.

    Args:
        requested: "auto", "bf16" or "fp32".
        device: where the model runs.

    Returns:
        ("bf16" or "fp32", the reason in one line). bf16 means autocast over fp32 master weights.
    """
    if requested == "fp32":
        return "fp32", "set by training.precision"
    hardware = bf16_hardware(device)
    emulated = f"this {device.type} device has no bf16 hardware and emulates it, much slower than fp32"
    if requested == "bf16":
        if hardware is None:
            logger.warning("training.precision=bf16: %s; auto selects fp32 on this device", emulated)
        return "bf16", f"set by training.precision ({hardware or emulated})"
    if requested != "auto":
        raise UserError(f"training.precision: got {requested!r}; allowed: auto, bf16, fp32")
    if hardware:
        return "bf16", f"{hardware} computes it in hardware"
    return "fp32", f"this {device.type} device has no bf16 hardware"
