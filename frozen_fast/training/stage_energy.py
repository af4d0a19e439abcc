"""Energy of a stage over all ranks' devices."""

from __future__ import annotations

from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling import EnergyMeter


class StageEnergy:
    """Joules of a stage over its whole wall time, with evaluation, checkpoints and the time before a resume."""

    def __init__(self, parallel: Parallel, meter: EnergyMeter | None, carried: float | None) -> None:
        """Start counting.

        Args:
            parallel: the ranks.
            meter: meter of this rank's device; None: unknown.
            carried: joules of the stage before this process, 0 for none; None: unknown.
        """
        self._parallel, self._meter, self._carried = parallel, meter, carried
        self._began = None if meter is None else meter.joules()

    def joules(self) -> float | None:
        """Return the joules so far, None if any part is unknown; a collective. A shared device counts once."""
        own: dict[str, float] | None = None
        now = None if self._meter is None else self._meter.joules()
        if self._meter is not None and self._began is not None and now is not None:
            own = {self._meter.uuid: now - self._began}
        devices: dict[str, float] = {}
        for rank_devices in self._parallel.gather_objects(own):
            if rank_devices is None or self._carried is None:
                return None
            devices.update(rank_devices)
        return (self._carried or 0.0) + sum(devices.values())
