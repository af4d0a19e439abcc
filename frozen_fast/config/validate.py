"""Rules that a type cannot say: ranges, and keys that must agree with one another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from frozen_fast.config.schema import (
    CurriculumConfig,
    DataConfig,
    ExperimentConfig,
    SourceConfig,
    StageConfig,
)
from frozen_fast.errors import UserError, unknown_name

_Rule = tuple[Callable[[Any], bool], str]

_POSITIVE: _Rule = (lambda value: value > 0, "more than 0")
_NOT_NEGATIVE: _Rule = (lambda value: value >= 0, "0 or more")
_AT_LEAST_ONE: _Rule = (lambda value: value >= 1, "1 or more")
_SHARE: _Rule = (lambda value: 0 <= value <= 1, "0 to 1")
_NOT_EMPTY: _Rule = (lambda value: bool(value.strip()), "text that is not empty")
_BETA: _Rule = (lambda value: 0 <= value < 1, "0 or more, below 1")

_RANGES: dict[str, _Rule] = {
    "name": _NOT_EMPTY,
    "run_folder": _NOT_EMPTY,
    "seed": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "model.video.checkpointed_blocks": _NOT_NEGATIVE,
    "model.video.position_init_std": _NOT_NEGATIVE,
    "model.video.temporal_init_std": _NOT_NEGATIVE,
    "model.video.size": _NOT_EMPTY,
    "model.video.weights": _NOT_EMPTY,
    "model.text.name": _NOT_EMPTY,
    "model.text.max_tokens": (lambda value: value >= 3, "3 or more (the start, one word, the end)"),
    "model.text.frozen_layers": _NOT_NEGATIVE,
    "model.embedding_width": _AT_LEAST_ONE,
    "data.decode.threads": _AT_LEAST_ONE,
    "data.decode.workers": _NOT_NEGATIVE,
    "data.decode.prefetch_batches": _AT_LEAST_ONE,
    "data.decode.max_bad_share": _SHARE,
    "data.decode.max_image_pixels": _AT_LEAST_ONE,
    "data.decode.read_timeout_seconds": _POSITIVE,
    "data.augmentation.horizontal_flip": _SHARE,
    "curriculum.gradient_accumulation_steps": _AT_LEAST_ONE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.betas[0]": _BETA,
    "optimizer.betas[1]": _BETA,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.text_learning_rate_scale": _NOT_NEGATIVE,
    "optimizer.position_learning_rate_scale": _NOT_NEGATIVE,
    "optimizer.gradient_clip_norm": _NOT_NEGATIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "loss.temperature": _POSITIVE,
    "loss.max_logit_scale": _POSITIVE,
    "loss.margin": _NOT_NEGATIVE,
    "loss.chunk_rows": _NOT_NEGATIVE,
    "training.log_every_steps": _AT_LEAST_ONE,
    "training.profile_steps": _NOT_NEGATIVE,
    "checkpoints.every_steps": _NOT_NEGATIVE,
    "checkpoints.keep": _AT_LEAST_ONE,
    "evaluation.stride_seconds": _NOT_NEGATIVE,
    "evaluation.max_windows": _NOT_NEGATIVE,
    "evaluation.batch_size": _AT_LEAST_ONE,
    "evaluation.resize": _AT_LEAST_ONE,
}
_RANGES_IF_SET: dict[str, _Rule] = {
    "curriculum.budget_clips": _AT_LEAST_ONE,
    "curriculum.budget_epochs": _POSITIVE,
    "training.expected_world_size": _AT_LEAST_ONE,
    "evaluation.frames": _AT_LEAST_ONE,
}
_CUTS: dict[str, tuple[str, ...]] = {
    "webvid": ("2M", "10M"),
    "msrvtt": ("1k-A", "1k-B", "full"),
    "msrvtt_clip4clip": ("1k-A", "1k-A-7k", "full"),
}


def check(config: ExperimentConfig) -> None:
    """Refuse a config whose values are out of range or disagree.

    Raises:
        UserError: naming the first key at fault, its value and what is allowed.
    """
    for path, rule in _RANGES.items():
        _check_value(path, _value_at(config, path), rule)
    for path, rule in _RANGES_IF_SET.items():
        value = _value_at(config, path)
        if value is not None:
            _check_value(path, value, rule)
    _check_augmentation(config.data)
    _check_sources("data.sources", config.data.sources)
    _check_sources("evaluation.sources", config.evaluation.sources)
    _check_curriculum(config.curriculum, config.data)
    _check_run_folder(config.run_folder)
    _check_keep_best(config)


def check_for_training(config: ExperimentConfig) -> None:
    """Refuse a config that is sound but has nothing to train on.

    Raises:
        UserError: when data.sources is empty, no source has any weight, or the one that ends an epoch has none.
    """
    if not config.data.sources:
        raise UserError("data.sources: got none; allowed: one or more sources to train on")
    if not any(source.weight > 0 for source in config.data.sources):
        raise UserError("data.sources: got weight 0 for every source; allowed: at least one weight above 0")
    if config.data.epoch_ends == "first" and config.data.sources[0].weight == 0:
        raise UserError(
            "data.epoch_ends: got 'first' while data.sources[0] has weight 0 and is never read; "
            "allowed: a weight above 0 for it, or another end"
        )


def check_for_evaluation(config: ExperimentConfig) -> None:
    """Refuse a config that names nothing to evaluate on.

    Raises:
        UserError: when evaluation.sources is empty.
    """
    if not config.evaluation.sources:
        raise UserError("evaluation.sources: got none; allowed: one or more sources to evaluate on")


def _value_at(config: ExperimentConfig, path: str) -> Any:
    value: Any = config
    for step in path.replace("[", ".").replace("]", "").split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


def _check_value(path: str, value: Any, rule: _Rule) -> None:
    test, allowed = rule
    if not test(value):
        raise UserError(f"{path}: got {value!r}; allowed: {allowed}")


def _check_augmentation(data: DataConfig) -> None:
    augmentation = data.augmentation
    low, high = augmentation.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.augmentation.crop_scale: got [{low}, {high}]; allowed: 0 < smallest <= largest <= 1")
    low, high = augmentation.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"data.augmentation.crop_ratio: got [{low}, {high}]; allowed: 0 < smallest <= largest")
    for index, value in enumerate(augmentation.std):
        _check_value(f"data.augmentation.std[{index}]", value, _POSITIVE)


def _check_sources(path: str, sources: Sequence[SourceConfig]) -> None:
    for index, source in enumerate(sources):
        here = f"{path}[{index}]"
        _check_value(f"{here}.path", source.path, _NOT_EMPTY)
        if source.format not in ("manifest", "shards"):
            _check_value(f"{here}.split", source.split, _NOT_EMPTY)
        _check_value(f"{here}.max_caption_characters", source.max_caption_characters, _NOT_NEGATIVE)
        _check_value(f"{here}.weight", source.weight, _NOT_NEGATIVE)
        _check_value(f"{here}.max_clips", source.max_clips, _NOT_NEGATIVE)
        cuts = _CUTS.get(source.format)
        if cuts is None and source.cut:
            raise UserError(f"{here}.cut: got {source.cut!r}; allowed: nothing, format {source.format} has no cuts")
        if cuts is not None and source.cut not in cuts:
            raise unknown_name(f"{here}.cut", source.cut, cuts)
    counts = Counter(source.name or source.format for source in sources)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"{path}: got {count} sources called {name!r}; allowed: one of each name (set their name)")


def _check_curriculum(curriculum: CurriculumConfig, data: DataConfig) -> None:
    if not curriculum.stages:
        raise UserError("curriculum.stages: got none; allowed: one or more stages")
    names = {source.name or source.format for source in data.sources}
    before = 0
    for index, stage in enumerate(curriculum.stages):
        here = f"curriculum.stages[{index}]"
        _check_stage(here, stage)
        if stage.frames < before:
            raise UserError(f"{here}.frames: got {stage.frames}; allowed: {before} or more, as in the stage before")
        before = stage.frames
        for name, _ in stage.batch_sizes:
            if name not in names:
                raise unknown_name(f"{here}.batch_sizes", name, names or {"(no data.sources)"})
    _check_budget(curriculum)


def _check_stage(here: str, stage: StageConfig) -> None:
    _check_value(f"{here}.frames", stage.frames, _AT_LEAST_ONE)
    _check_value(f"{here}.global_batch_size", stage.global_batch_size, _AT_LEAST_ONE)
    _check_value(f"{here}.learning_rate_scale", stage.learning_rate_scale, _NOT_NEGATIVE)
    for name, size in stage.batch_sizes:
        _check_value(f"{here}.batch_sizes.{name}", size, _AT_LEAST_ONE)
    if (stage.share is None) == (stage.steps is None):
        got = "neither share nor steps" if stage.share is None else f"share {stage.share} and steps {stage.steps}"
        raise UserError(f"{here}: got {got}; allowed: exactly one of share, steps (set the other to null)")
    if stage.share is not None:
        _check_value(f"{here}.share", stage.share, (lambda value: 0 < value <= 1, "more than 0, at most 1"))
    if stage.steps is not None:
        _check_value(f"{here}.steps", stage.steps, _AT_LEAST_ONE)


def _check_budget(curriculum: CurriculumConfig) -> None:
    shares = [stage.share for stage in curriculum.stages if stage.share is not None]
    budgets = [name for name in ("budget_clips", "budget_epochs") if getattr(curriculum, name) is not None]
    if not shares:
        if budgets:
            raise UserError(
                f"curriculum.{budgets[0]}: got {getattr(curriculum, budgets[0])}, but no stage has a share; "
                "allowed: a budget with shares, or steps without a budget"
            )
        return
    if len(budgets) != 1:
        got = "neither" if not budgets else "both"
        raise UserError(
            f"curriculum: got {got} of budget_clips, budget_epochs; "
            "allowed: exactly one of them where stages name shares"
        )
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise UserError(f"curriculum.stages: got shares that sum to {sum(shares):.6g}; allowed: a sum of 1")


def _check_keep_best(config: ExperimentConfig) -> None:
    evaluation = config.evaluation
    if evaluation.keep_best != "none" and (not evaluation.sources or evaluation.every == "never"):
        why = "no evaluation.sources" if not evaluation.sources else "evaluation.every: never"
        raise UserError(
            f"evaluation.keep_best: got {evaluation.keep_best!r} with {why}; allowed: none, or something to evaluate"
        )


def _check_run_folder(text: str) -> None:
    try:
        text.format(name="x")
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"run_folder: got {text!r}; allowed: a path in which {{name}} is the experiment's name"
        ) from None
