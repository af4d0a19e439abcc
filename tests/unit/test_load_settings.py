"""What data.decode leaves open, by device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from frozen_fast.config.schema import DecodeConfig
from frozen_fast.data.load import load_settings as module
from frozen_fast.data.load.load_settings import LoadSettings, load_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("decode", "device", "cores", "expected"),
    [
        ({}, CPU, 8, (0, 2, 2)),
        ({}, CUDA, 8, (7, 1, 14)),
        ({}, CUDA, 1, (1, 1, 2)),
        ({}, CUDA, 192, (16, 1, 32)),
        ({"backend": "dali"}, CUDA, 8, (0, 2, 2)),
        ({"backend": "torchcodec"}, CUDA, 4, (3, 1, 6)),
        ({"workers": 0}, CUDA, 8, (0, 2, 2)),
        ({"workers": 3}, CUDA, 8, (3, 2, 6)),
        ({"workers": 3, "threads": 4, "prefetch_batches": 1}, CPU, 8, (3, 4, 1)),
    ],
)
def test_what_is_open_follows_the_device(
    decode: dict[str, Any], device: torch.device, cores: int, expected: tuple[int, int, int]
) -> None:
    assert load_settings(DecodeConfig(**decode), device, cores=cores) == LoadSettings(*expected)


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 96)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert load_settings(DecodeConfig(), CUDA).workers == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "128")
    assert load_settings(DecodeConfig(), CUDA).workers == 1
