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
        task: the training loss and the evaluation.
        sources: training sources by name.
        evaluation_sources: evaluation sources by name.
        fingerprints: name of a training source -> hash of its clips.
        loader: training batches.
        plans: the stages with all numbers resolved.
        flops_per_clip: (frames, text tokens, clips of a global batch) -> model FLOPs of one training clip; None if
            unknown.
        peak: this device's datasheet peak; None if unknown.
        measured_peak: the peak measured on this device before the first stage (training.measure_peak).
        energy: this device's energy meter; None if it has none.
        teachers: teachers for distillation; None if the config names none.
        watchdog: watches the time of each phase.
        roll_backs: number of roll-backs to a checkpoint; each one changes the order of the clips.
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
        """Number of optimizer steps of the whole run."""
        return sum(plan.steps for plan in self.plans)
