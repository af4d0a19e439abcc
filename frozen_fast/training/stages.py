"""Changes between the stages of the curriculum."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from frozen_fast.config import StagePlan
from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.models.video.temporal import expand_temporal_embedding
from frozen_fast.models.video_side import VideoSide
from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.meter import StageMeter
from frozen_fast.training.stage_energy import StageEnergy

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 3
_LARGEST_WARM_UP_SHARE = 0.25


@dataclass(frozen=True)
class OpenStage:
    """The current stage: its plan, its timing and its energy."""

    plan: StagePlan
    meter: StageMeter
    energy: StageEnergy

    def totals(self) -> dict[str, Any]:
        """Return the stage's time and energy so far for a checkpoint; a collective."""
        return {**self.meter.state_dict(), "joules": self.energy.joules()}


def describe_plan(plan: StagePlan) -> str:
    """Describe the stage in one line for the log."""
    sizes = ", ".join(f"{name} {size}" for name, size in plan.batch_sizes.items())
    passes = f" x {plan.accumulation} passes" if plan.accumulation > 1 else ""
    return f"{plan.frames} frames, {plan.steps} steps, batch {sizes}{passes}"


def expand_frames(parallel: Parallel, model: RetrievalModel, num_frames: int, method: str) -> None:
    """Expand the tower's frame embeddings, and the optimizer's state, to num_frames frames.

    A parameter keeps its shape ([1, most frames of the run, D]); its first num_frames rows are computed from the
    learned ones. The optimizer's running averages are mapped in the same way, so that a row starts with the state of
    the rows it is computed from (zero for new rows). Nothing changes if the model has learned num_frames or more.

    Args:
        parallel: provides whole parameters under every strategy.
        model: the bare model.
        num_frames: frames of the stage.
        method: "zero", "nearest" or "bilinear".
    """
    learned = model.learned_frames
    if num_frames <= learned:
        return
    if not hasattr(model, "expand_frames"):
        raise UserError(f"curriculum.stages: got {num_frames} frames for a {model.kind}; allowed: up to {learned}")
    encoder = cast(VideoSide, model)
    names = encoder.frame_embeddings()
    with ExitStack() as stack:
        states = [stack.enter_context(parallel.state.edit_parameter(name)) for name in names]
        encoder.expand_frames(num_frames, method)
        for state in states:
            for tensor_1TD in state.values():
                tensor_1TD[:, :num_frames] = expand_temporal_embedding(tensor_1TD[:, :learned], num_frames, method)
    what = f"{', '.join(names)} ({method})" if names else "the video tower has no weights per frame"
    log.info("%d -> %d frames: %s", learned, num_frames, what)


def warm_up_steps(stage_steps: int, num_sources: int) -> int:
    """Number of warm-up steps of a stage, which speeds exclude: buffers, autotuning and compilation, once per source.

    Never more than a quarter of the stage, so that a short stage still has a speed.
    """
    return min(_WARM_UP_STEPS * num_sources, int(stage_steps * _LARGEST_WARM_UP_SHARE))
