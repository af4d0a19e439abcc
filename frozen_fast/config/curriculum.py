"""Conversion of the curriculum's shares of a budget to optimizer steps. Pure functions, no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from frozen_fast.config.schema import DataConfig, ExperimentConfig, SourceConfig, StageConfig
from frozen_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage with all its numbers resolved."""

    index: int
    frames: int
    """Frames of a video clip; images are one frame in every stage."""
    source_frames: dict[str, int]
    """Per source: frames of its clips in this stage."""
    batch_sizes: dict[str, int]
    """Per source: clips of one forward pass over all ranks."""
    micro_batch_sizes: dict[str, int]
    """Per source: clips of one forward pass on one rank."""
    accumulation: int
    """Forward passes per optimizer step."""
    steps: int
    """Optimizer steps."""
    expected_clips: int
    """Clips of the whole stage over all ranks; with several sources, the number expected from their weights."""
    learning_rate_scale: float
    epoch_steps: float
    """Optimizer steps of one epoch at these batch sizes, as data.epoch_ends counts epochs."""

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether an epoch of the stage ends at its step number steps_done."""
        return math.floor(steps_done / self.epoch_steps) > math.floor((steps_done - 1) / self.epoch_steps)


def loss_batch_size(config: ExperimentConfig) -> int:
    """Clips per batch of the validation loss: the batch size of the first training source in the last stage.

    The size is constant in a run, because a loss over fewer clips has fewer negatives and is lower.
    """
    stage = config.curriculum.stages[-1]
    names = [source_name(source) for source in config.data.sources[:1]]
    return dict(stage.batch_sizes).get(names[0], stage.global_batch_size) if names else stage.global_batch_size


def source_name(source: SourceConfig) -> str:
    """Name of a source: its own, or its format's."""
    return source.name or source.format


def step_fractions(data: DataConfig) -> dict[str, float]:
    """Share of the optimizer steps that each source gets, by its weight; sums to 1."""
    total = sum(source.weight for source in data.sources)
    assert total > 0, "check_for_training lets no config through without a weight above 0"
    return {source_name(source): source.weight / total for source in data.sources}


def steps_per_epoch(data: DataConfig, clips_per_source: Mapping[str, int], clips_per_step: Mapping[str, int]) -> float:
    """Optimizer steps of an epoch over all sources, as data.epoch_ends defines it.

    Args:
        data: sources, their weights and the rule.
        clips_per_source: clips that each source holds.
        clips_per_step: clips that one optimizer step takes from each source.
    """
    fractions = step_fractions(data)
    steps = {
        name: clips_per_source[name] / (fraction * clips_per_step[name])
        for name, fraction in fractions.items()
        if fraction > 0
    }
    if data.epoch_ends == "all":
        return max(steps.values())
    if data.epoch_ends == "shortest":
        return steps[min(steps, key=lambda name: clips_per_source[name])]
    if data.epoch_ends == "longest":
        return steps[max(steps, key=lambda name: clips_per_source[name])]
    return next(iter(steps.values()))


def resolve_stages(
    config: ExperimentConfig,
    clips_per_source: Mapping[str, int],
    world_size: int,
    *,
    image_sources: Collection[str] = (),
) -> tuple[StagePlan, ...]:
    """Compute every stage's batch sizes and steps.

    A stage with a share of budget_clips has the number of steps whose expected clips are closest to that share; with a
    share of budget_epochs, that number of epochs at its own batch sizes. A stage has at least one step.

    Args:
        config: a checked config with at least one training source.
        clips_per_source: clips that each source of data.sources holds, by its name.
        world_size: number of ranks; every batch size must be a multiple of it.
        image_sources: names of the sources whose clips are still images: one frame in every stage.

    Returns:
        One plan per stage, in order.

    Raises:
        UserError: for a batch size that is not a multiple of world_size, or that is larger than its source.
    """
    fractions = step_fractions(config.data)
    plans = []
    for index, stage in enumerate(config.curriculum.stages):
        accumulation = config.curriculum.gradient_accumulation_steps
        batch_sizes = _batch_sizes(stage, index, clips_per_source, fractions, world_size)
        clips_per_step = {name: size * accumulation for name, size in batch_sizes.items()}
        mean_clips_per_step = sum(fraction * clips_per_step[name] for name, fraction in fractions.items())
        steps = _steps(config, stage, mean_clips_per_step, clips_per_source, clips_per_step)
        plans.append(
            StagePlan(
                index=index,
                frames=stage.frames,
                source_frames={name: 1 if name in image_sources else stage.frames for name in batch_sizes},
                batch_sizes=batch_sizes,
                micro_batch_sizes={name: size // world_size for name, size in batch_sizes.items()},
                accumulation=accumulation,
                steps=steps,
                expected_clips=round(steps * mean_clips_per_step),
                learning_rate_scale=stage.learning_rate_scale,
                epoch_steps=steps_per_epoch(config.data, clips_per_source, clips_per_step),
            )
        )
    return tuple(plans)


def _steps(
    config: ExperimentConfig,
    stage: StageConfig,
    mean_clips_per_step: float,
    clips_per_source: Mapping[str, int],
    clips_per_step: Mapping[str, int],
) -> int:
    if stage.steps is not None:
        return stage.steps
    assert stage.share is not None, "check() asks for steps or a share"
    if config.curriculum.budget_clips is not None:
        steps = config.curriculum.budget_clips / mean_clips_per_step
    else:
        assert config.curriculum.budget_epochs is not None, "check() asks for a budget where there are shares"
        steps = config.curriculum.budget_epochs * steps_per_epoch(config.data, clips_per_source, clips_per_step)
    return max(1, round(stage.share * steps))


def _batch_sizes(
    stage: StageConfig,
    index: int,
    clips_per_source: Mapping[str, int],
    fractions: Mapping[str, float],
    world_size: int,
) -> dict[str, int]:
    given = dict(stage.batch_sizes)
    sizes = {}
    for name, fraction in fractions.items():
        key = f"curriculum.stages[{index}]." + (f"batch_sizes.{name}" if name in given else "global_batch_size")
        size = given.get(name, stage.global_batch_size)
        if size % world_size:
            raise UserError(f"{key}: got {size} on {world_size} processes; allowed: a multiple of {world_size}")
        if fraction > 0 and size > clips_per_source[name]:
            raise UserError(
                f"{key}: got {size}; allowed: at most {clips_per_source[name]}, "
                f"the clips of source {name!r} (a batch contains a clip only once)"
            )
        sizes[name] = size
    return sizes
