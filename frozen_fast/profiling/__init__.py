"""Profiling: time by stage and GPU-hours, model FLOPs, device peaks, energy, and the paper's Table 4."""

from frozen_fast.profiling.energy import EnergyMeter, energy_meter
from frozen_fast.profiling.flops import ClipFlops, clip_flops
from frozen_fast.profiling.memory import peak_memory_bytes, reset_peak_memory
from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.profiling.paper import HARDWARE_NOTE, PaperRow, PaperTable, table_4
from frozen_fast.profiling.peak import DevicePeak, device_peak, measure_peak

__all__ = [
    "HARDWARE_NOTE",
    "ClipFlops",
    "DevicePeak",
    "EnergyMeter",
    "PaperRow",
    "PaperTable",
    "StageMeter",
    "StepTime",
    "clip_flops",
    "device_peak",
    "energy_meter",
    "measure_peak",
    "peak_memory_bytes",
    "reset_peak_memory",
    "table_4",
]
