"""Profiling: time by stage and GPU-hours, model FLOPs, device peaks, energy, traces, and the paper's Table 4."""

from frozen_fast.profiling.meter import StageMeter, StepTime
from frozen_fast.profiling.peak import DevicePeak, device_peak, measure_peak

__all__ = ["DevicePeak", "StageMeter", "StepTime", "device_peak", "measure_peak"]
