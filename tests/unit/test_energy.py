"""Energy: the difference of NVML's counters, over all ranks' devices, or not known; never a guess."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pynvml
import pytest
import torch

from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.energy import EnergyMeter, energy_meter
from frozen_fast.training.stage_energy import StageEnergy

CUDA = torch.device("cuda", 1)


class FakeNvml:
    """Two devices; a device has used 1500 millijoules more at every reading of its counter."""

    def __init__(self, patch: pytest.MonkeyPatch, uuid: str = "bb") -> None:
        self.failing, self.code = "", 0
        self.used = {"GPU-aa": 10_000, "GPU-bb": 70_000}
        patch.setattr(pynvml, "nvmlInit", lambda: self._fail("init"))
        patch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self.handle)
        patch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", self.energy)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))

    def _fail(self, name: str) -> None:
        if name == self.failing:
            raise pynvml.NVMLError(self.code)

    def handle(self, uuid: str) -> str:
        self._fail("handle")
        if uuid not in self.used:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def energy(self, handle: str) -> int:
        self._fail("energy")
        self.used[handle] += 1500
        return self.used[handle]


def test_joules_are_the_difference_of_the_own_devices_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch)
    meter, source = energy_meter(CUDA)
    assert meter is not None and (meter.uuid, source) == ("GPU-bb", "NVML's counter of GPU-bb")
    assert [meter.joules(), meter.joules()] == [1.5, 3.0]
    assert nvml.used["GPU-aa"] == 10_000
    nvml.failing, nvml.code = "energy", pynvml.NVML_ERROR_GPU_IS_LOST
    assert meter.joules() is None


@pytest.mark.parametrize(
    ("failing", "code", "uuid", "why"),
    [
        ("init", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "aa", "Driver Not Loaded for GPU-aa"),
        ("energy", pynvml.NVML_ERROR_NOT_SUPPORTED, "aa", "Not Supported for GPU-aa"),
        ("", 0, "cc", "Not Found for GPU-cc"),
    ],
)
def test_what_nvml_refuses_is_not_known_and_said(
    monkeypatch: pytest.MonkeyPatch, failing: str, code: int, uuid: str, why: str
) -> None:
    nvml = FakeNvml(monkeypatch, uuid)
    nvml.failing, nvml.code = failing, code
    meter, said = energy_meter(CUDA)
    assert meter is None and said.startswith("not measured: NVML says ") and said.endswith(why)


def test_without_the_library_or_a_gpu_energy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter(torch.device("cpu"))[0] is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa"))

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    meter, said = energy_meter(CUDA)
    assert meter is None and "NVML Shared Library Not Found" in said


def ranks(*others: dict[str, float] | None) -> Parallel:
    """This rank's wishes before those of the others."""
    return cast(Parallel, SimpleNamespace(gather_objects=lambda own: [own, *others]))


def test_a_stages_energy_is_that_of_all_ranks_devices_and_of_its_earlier_part(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch)
    energy = StageEnergy(ranks({"GPU-cc": 4.0}), EnergyMeter("GPU-aa"), 100.0)
    assert energy.joules() == pytest.approx(100.0 + 1.5 + 4.0)
    assert energy.joules() == pytest.approx(100.0 + 3.0 + 4.0)
    shared = StageEnergy(ranks({"GPU-aa": 1.5}), EnergyMeter("GPU-aa"), 0.0)
    assert shared.joules() == pytest.approx(1.5)


def test_a_part_that_is_not_known_leaves_the_stage_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch)
    meter = EnergyMeter("GPU-aa")
    assert StageEnergy(ranks(None), meter, 0.0).joules() is None
    assert StageEnergy(ranks(), None, 0.0).joules() is None
    assert StageEnergy(ranks(), meter, None).joules() is None
