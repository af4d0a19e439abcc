"""Energy of NVIDIA devices through NVML (package nvidia-ml-py), where there is one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType

log = logging.getLogger(__name__)


class EnergyMeter:
    """Joules that devices have used since the meter was built.

    Args:
        nvml: the pynvml module, initialised.
        indices: NVML's indices of the devices.
    """

    def __init__(self, nvml: ModuleType, indices: Sequence[int]) -> None:
        self._nvml = nvml
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
        self._began = self._millijoules()

    def joules(self) -> float:
        """Energy of all devices together since the start."""
        return (self._millijoules() - self._began) / 1000.0

    def _millijoules(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)


def energy_meter(indices: Sequence[int]) -> EnergyMeter | None:
    """A meter over some devices, or None where NVML, a device or its energy counter is missing (logged with why)."""
    try:
        import pynvml
    except ImportError:
        log.info("energy is not measured: pynvml is not installed")
        return None
    try:
        pynvml.nvmlInit()
        return EnergyMeter(pynvml, indices)
    except pynvml.NVMLError as error:
        log.info("energy is not measured: %s", error)
        return None
