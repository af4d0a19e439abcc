"""Device peaks: names that mean different devices, unknown ones, and a measurement."""

from __future__ import annotations

import pytest

from frozen_fast.errors import UserError
from frozen_fast.profiling import device_peak, measure_peak


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla T4", "fp16", 65.0),
    ],
)
def test_known_devices(name: str, dtype: str, tflops: float) -> None:
    peak = device_peak(name, dtype)
    assert peak is not None
    assert peak.flops_per_second == pytest.approx(tflops * 1e12)
    assert peak.device == name and "NVIDIA" in peak.source
    assert peak.bytes_per_second is not None and 0.3e12 <= peak.bytes_per_second <= 8e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "AMD EPYC 7B13",
        "cpu",
        "",
    ],
)
def test_other_devices_have_no_guessed_peak(name: str) -> None:
    assert device_peak(name, "bf16") is None


def test_a_type_the_device_lacks_has_no_peak() -> None:
    assert device_peak("Tesla V100-SXM2-16GB", "bf16") is None
    with pytest.raises(UserError, match="dtype: got 'fp8'; allowed: bf16, fp16, fp32"):
        device_peak("NVIDIA H200", "fp8")


def test_bandwidth_tells_the_a100_variants_apart() -> None:
    bandwidths = [
        device_peak(name, "bf16").bytes_per_second  # type: ignore[union-attr]
        for name in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB")
    ]
    assert bandwidths == sorted(bandwidths) and len(set(bandwidths)) == 3


def test_measuring_says_what_was_measured() -> None:
    peak = measure_peak("cpu", "fp32", size=128, repeats=2)
    assert peak.flops_per_second > 0 and peak.bytes_per_second is not None and peak.bytes_per_second > 0
    assert peak.source.startswith("measured: 128-cubed fp32 matrix product") and peak.device.startswith("cpu")
