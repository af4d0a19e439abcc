"""Energy of an NVIDIA device through NVML, the library that comes with the driver; measured or not known."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

NVML_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0


class NvmlError(RuntimeError):
    """NVML refuses: no driver, no such device, or a device without an energy counter."""


class EnergyMeter:
    """Joules that one device has used since the meter was built.

    Attributes:
        uuid: NVML's name of the device, "GPU-...": two processes on one device share its counter.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        """Find the device and read its counter.

        Args:
            nvml: the library as ctypes loads it.
            uuid: "GPU-" and the device's UUID.

        Raises:
            NvmlError: there is no such device or counter.
        """
        self.uuid = uuid
        self._nvml = nvml
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))
        self._began = self._millijoules()

    def joules(self) -> float | None:
        """Energy since the start; None once the counter cannot be read any more."""
        try:
            return (self._millijoules() - self._began) / 1000.0
        except NvmlError as error:
            log.warning("energy is not measured any more: %s", error)
            return None

    def _millijoules(self) -> int:
        counter = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(counter))
        return counter.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._nvml, name)(*arguments)
        if code != _SUCCESS:
            raise NvmlError(f"{name} gave error {code} for {self.uuid}")


def energy_meter(device: torch.device) -> tuple[EnergyMeter | None, str]:
    """A meter of a device's energy.

    Returns:
        (meter, what it reads), or (None, why energy is not known here).
    """
    if device.type != "cuda":
        return None, f"no energy counter is read for {device.type}"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return EnergyMeter(ctypes.CDLL(NVML_LIBRARY), uuid), f"NVML's counter of {uuid}"
    except (OSError, AttributeError, NvmlError) as error:  # AttributeError: an NVML or a device that lacks a name
        return None, f"not measured: {error}"
