"""The built parts of a run, which the engine and its helpers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from frozen_fast.config import StagePlan
from frozen_fast.data import Source, TrainingLoader
from frozen_fast.data.load.feature_loader import FeatureTrainingLoader
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.profiling.energy import EnergyMeter
from frozen_fast.profiling.flops import TrainingFlops
from frozen_fast.profiling.peak import DevicePeak
from frozen_fast.training.task import Task
from frozen_fast.training.teachers import Teachers
from frozen_fast.training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The built parts of a run.

    Attributes:
        model: on its device and wrapped by `parallel`.
        task: what training minimises, and how the model is evaluated.
        sources: training sources by name.
        evaluation_sources: likewise.
        fingerprints: name -> what identifies a training source's clips.
        loader: training batches.
        plans: the stages, every number settled.
        flops_per_clip: (frames, text tokens, clips of a global batch) -> model FLOPs of one training clip, None where
            they are not known.
        peak: this device's datasheet peak, where known.
        measured_peak: a peak measured on this device before the first stage (training.measure_peak).
        energy: this device's energy meter, where there is one.
        teachers: whose similarities the model follows, where the config names some.
        watchdog: watches the time of each phase.
        roll_backs: how often the run has gone back to a checkpoint; each time the order of the clips changes.
    """

    model: RetrievalModel
    task: Task
    sources: Mapping[str, Source]
    evaluation_sources: Mapping[str, Source]
    fingerprints: Mapping[str, str]
    loader: TrainingLoader | FeatureTrainingLoader
    plans: Sequence[StagePlan]
    flops_per_clip: Callable[[int, int, int], TrainingFlops | None]
    peak: DevicePeak | None
    measured_peak: DevicePeak | None = None
    energy: EnergyMeter | None = None
    teachers: Teachers | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)
    roll_backs: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(plan.steps for plan in self.plans)
