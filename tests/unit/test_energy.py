"""Energy: the difference of NVML's counters, over all ranks' devices, or not known; never a guess."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.energy import NVML_LIBRARY, EnergyMeter, energy_meter
from frozen_fast.training.stage_energy import StageEnergy

CUDA = torch.device("cuda", 1)


class FakeNvml:
    """Two devices; a device has used 1500 millijoules more at every reading of its counter."""

    def __init__(self, *, failing: str = "", code: int = 9) -> None:
        self.failing, self.code = failing, code
        self.used = {b"GPU-aa": 10_000, b"GPU-bb": 70_000}
        self.uuids = list(self.used)

    def _answer(self, name: str, action: Callable[[], None]) -> int:
        if name == self.failing:
            return self.code
        action()
        return 0

    def nvmlInit_v2(self) -> int:
        return self._answer("init", lambda: None)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        if uuid not in self.used:
            return 6
        return self._answer("handle", lambda: setattr(handle._obj, "value", 1 + self.uuids.index(uuid)))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, counter: Any) -> int:
        assert handle.value is not None

        def read(uuid: bytes = self.uuids[handle.value - 1]) -> None:
            self.used[uuid] += 1500
            counter._obj.value = self.used[uuid]

        return self._answer("energy", read)


def load(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, uuid: str = "bb") -> None:
    def library(name: str) -> FakeNvml:
        assert name == NVML_LIBRARY
        return nvml

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))


def test_joules_are_the_difference_of_the_own_devices_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    load(monkeypatch, nvml)
    meter, source = energy_meter(CUDA)
    assert meter is not None and (meter.uuid, source) == ("GPU-bb", "NVML's counter of GPU-bb")
    assert [meter.joules(), meter.joules()] == [1.5, 3.0]
    assert nvml.used[b"GPU-aa"] == 10_000
    nvml.failing = "energy"
    assert meter.joules() is None


@pytest.mark.parametrize(
    ("nvml", "uuid", "reason"),
    [
        (FakeNvml(failing="init"), "aa", "nvmlInit_v2 gave error 9"),
        (FakeNvml(failing="energy", code=3), "aa", "nvmlDeviceGetTotalEnergyConsumption gave error 3 for GPU-aa"),
        (FakeNvml(), "cc", "nvmlDeviceGetHandleByUUID gave error 6 for GPU-cc"),
    ],
)
def test_what_nvml_refuses_is_not_known_and_said(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, uuid: str, reason: str
) -> None:
    load(monkeypatch, nvml, uuid)
    meter, said = energy_meter(CUDA)
    assert meter is None and reason in said


def test_without_the_library_or_a_gpu_energy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter(torch.device("cpu"))[0] is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa"))
    monkeypatch.setattr("frozen_fast.profiling.energy.NVML_LIBRARY", "libno-such-library.so.1")
    meter, said = energy_meter(CUDA)
    assert meter is None and "libno-such-library.so.1" in said


def ranks(*others: dict[str, float] | None) -> Parallel:
    """This rank's wishes before those of the others."""
    return cast(Parallel, SimpleNamespace(gather_objects=lambda own: [own, *others]))


def test_a_stages_energy_is_that_of_all_ranks_devices_and_of_its_earlier_part() -> None:
    nvml = FakeNvml()
    energy = StageEnergy(ranks({"GPU-cc": 4.0}), EnergyMeter(nvml, "GPU-aa"), 100.0)
    assert energy.joules() == pytest.approx(100.0 + 1.5 + 4.0)
    assert energy.joules() == pytest.approx(100.0 + 3.0 + 4.0)
    shared = StageEnergy(ranks({"GPU-aa": 1.5}), EnergyMeter(nvml, "GPU-aa"), 0.0)
    assert shared.joules() == pytest.approx(1.5)


def test_a_part_that_is_not_known_leaves_the_stage_unknown() -> None:
    meter = EnergyMeter(FakeNvml(), "GPU-aa")
    assert StageEnergy(ranks(None), meter, 0.0).joules() is None
    assert StageEnergy(ranks(), None, 0.0).joules() is None
    assert StageEnergy(ranks(), meter, None).joules() is None
