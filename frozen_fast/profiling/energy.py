"""Energy of an NVIDIA device, measured with NVML (part of the driver)."""

from __future__ import annotations

import logging

import pynvml
import torch

log = logging.getLogger(__name__)


class EnergyMeter:
    """Energy in joules that a device has used since the meter was created.

    Attributes:
        uuid: NVML's name of the device, "GPU-...": two processes on one device share its counter.
    """

    def __init__(self, uuid: str) -> None:
        """Find the device and read its counter.

        Args:
            uuid: "GPU-" and the device's UUID.

        Raises:
            pynvml.NVMLError: no driver, no such device, or a device without an energy counter.
        """
        pynvml.nvmlInit()
        self.uuid = uuid
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._began = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules(self) -> float | None:
        """Energy since the start; None if the counter can no longer be read."""
        try:
            return (pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._began) / 1000.0
        except pynvml.NVMLError as error:
            log.warning("energy is no longer measured: %s", error)
            return None


def energy_meter(device: torch.device) -> tuple[EnergyMeter | None, str]:
    """A meter of a device's energy.

    Returns:
        (meter, its source), or (None, why energy is not measured).
    """
    if device.type != "cuda":
        return None, f"no energy counter is read for {device.type}"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return EnergyMeter(uuid), f"NVML's counter of {uuid}"
    except pynvml.NVMLError as error:
        return None, f"not measured: NVML says {error} for {uuid}"
