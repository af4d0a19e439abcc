"""Peak speed of a device, from its datasheet or measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from frozen_fast.errors import UserError

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """A device's peak and its source."""

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float | None
    source: str


@dataclass(frozen=True)
class Datasheet:
    """Dense matrix-product peaks of one device in TFLOP/s by type (no sparsity; fp32 without TF32), and bandwidth."""

    words: tuple[str, ...]
    tflops: dict[str, float]
    terabytes_per_second: float
    source: str


# The first entry all of whose words stand in the device's name (lower case, as whole words) counts, so the special
# comes before the general.
DATASHEETS = (
    Datasheet(("b200",), {"bf16": 2250.0, "fp16": 2250.0, "fp32": 75.0}, 7.7, "NVIDIA HGX B200 datasheet, dense"),
    Datasheet(("h200", "nvl"), {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0}, 4.8, "NVIDIA H200 NVL datasheet, dense"),
    Datasheet(("h200",), {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9}, 4.8, "NVIDIA H200 SXM datasheet, dense"),
    Datasheet(("h100", "pcie"), {"bf16": 756.0, "fp16": 756.0, "fp32": 51.2}, 2.0, "NVIDIA H100 PCIe datasheet, dense"),
    Datasheet(("h100", "nvl"), {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0}, 3.9, "NVIDIA H100 NVL datasheet, dense"),
    Datasheet(("h100",), {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9}, 3.35, "NVIDIA H100 SXM datasheet, dense"),
    Datasheet(
        ("a100", "80gb", "pcie"), {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}, 1.935, "NVIDIA A100 datasheet, dense"
    ),
    Datasheet(("a100", "80gb"), {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}, 2.039, "NVIDIA A100 datasheet, dense"),
    Datasheet(("a100",), {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}, 1.555, "NVIDIA A100 40GB datasheet, dense"),
    Datasheet(("l40s",), {"bf16": 362.05, "fp16": 362.05, "fp32": 91.6}, 0.864, "NVIDIA L40S datasheet, dense"),
    Datasheet(("l4",), {"bf16": 121.0, "fp16": 121.0, "fp32": 30.3}, 0.3, "NVIDIA L4 datasheet, dense"),
    Datasheet(
        ("rtx 4090",),
        {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
        1.008,
        "NVIDIA Ada GPU architecture paper, dense, fp32 accumulation",
    ),
    Datasheet(
        ("rtx 3090",),
        {"bf16": 71.0, "fp16": 71.0, "fp32": 35.6},
        0.936,
        "NVIDIA Ampere GA102 architecture paper, dense, fp32 accumulation",
    ),
    Datasheet(("v100", "pcie"), {"fp16": 112.0, "fp32": 14.0}, 0.9, "NVIDIA V100 datasheet, dense"),
    Datasheet(("v100",), {"fp16": 125.0, "fp32": 15.7}, 0.9, "NVIDIA V100 SXM2 datasheet, dense"),
    Datasheet(("t4",), {"fp16": 65.0, "fp32": 8.1}, 0.32, "NVIDIA T4 datasheet, dense"),
)
# A part of a device, or a slower one of nearly the same name: its peak is not in the table.
OTHER_DEVICES = ("mig", "laptop", "max-q", "d", "ti")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_peak(device_name: str, dtype: str) -> DevicePeak | None:
    """A device's datasheet peak.

    Args:
        device_name: as torch.cuda.get_device_name gives it.
        dtype: bf16, fp16 or fp32 (fp32 without TF32).

    Returns:
        None for a device or type that is not in the table: reports then print n/a.
    """
    _check_dtype(dtype)
    name = device_name.lower()
    if any(_holds(name, word) for word in OTHER_DEVICES):
        return None
    for sheet in DATASHEETS:
        if all(_holds(name, word) for word in sheet.words):
            if dtype not in sheet.tflops:
                return None
            return DevicePeak(
                device=device_name,
                dtype=dtype,
                flops_per_second=sheet.tflops[dtype] * TERA,
                bytes_per_second=sheet.terabytes_per_second * TERA,
                source=sheet.source,
            )
    return None


def measure_peak(
    device: torch.device | str, dtype: str = "bf16", *, size: int | None = None, repeats: int = 10
) -> DevicePeak:
    """Time a large square matrix product and a large copy on a device.

    Args:
        device: where to measure.
        dtype: bf16, fp16 or fp32.
        size: side of the matrices; none: 8192 on CUDA, 1024 elsewhere.
        repeats: timed runs; the fastest is used.

    Returns:
        The peak, with what was measured as its source. The copy's bytes are those read plus those written.
    """
    _check_dtype(dtype)
    device = torch.device(device)
    kind = DTYPES[dtype]
    size = size or (8192 if device.type == "cuda" else 1024)
    left = torch.randn(size, size, device=device).to(kind)
    right = torch.randn(size, size, device=device).to(kind)
    product = torch.empty_like(left)
    seconds = _fastest(lambda: torch.mm(left, right, out=product), device, repeats)
    elements = (1 << 30 if device.type == "cuda" else 1 << 25) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    measured = f"{size}-cubed {dtype} matrix product, copy of {4 * elements >> 20} MiB"
    copy_seconds = _fastest(lambda: target.copy_(source), device, repeats)
    on_host = f"{device.type} ({torch.get_num_threads()} threads)"
    return DevicePeak(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else on_host,
        dtype=dtype,
        flops_per_second=2 * size**3 / seconds,
        bytes_per_second=2 * 4 * elements / copy_seconds,
        source=f"measured: {measured}, fastest of {repeats}",
    )


def _fastest(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of some runs, each synchronised, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _holds(name: str, word: str) -> bool:
    """Whether a name holds a whole word: L4 is not in L40S, nor H200 in GH200."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name) is not None


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}; allowed: {', '.join(DTYPES)}")
