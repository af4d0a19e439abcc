"""Curriculum arithmetic, against brute force and by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from frozen_fast.config import (
    ExperimentConfig,
    config_from_mapping,
    loss_batch_size,
    resolve_stages,
    step_fractions,
    steps_per_epoch,
)
from frozen_fast.errors import UserError


def experiment(
    stages: list[dict[str, Any]],
    weights: dict[str, float] | None = None,
    data: dict[str, Any] | None = None,
    **rest: Any,
) -> ExperimentConfig:
    sources = [{"name": name, "path": name, "weight": weight} for name, weight in (weights or {"a": 1.0}).items()]
    return config_from_mapping({"data": {"sources": sources, **(data or {})}, "curriculum": {"stages": stages, **rest}})


def test_steps_are_taken_as_given() -> None:
    (plan,) = resolve_stages(
        experiment([{"steps": 7, "global_batch_size": 12, "learning_rate_scale": 0.5}]), {"a": 100}, 4
    )
    assert (plan.index, plan.frames, plan.steps, plan.expected_clips) == (0, 1, 7, 84)
    assert plan.batch_sizes == {"a": 12} and plan.micro_batch_sizes == {"a": 3}
    assert plan.accumulation == 1 and plan.learning_rate_scale == 0.5


def test_the_paper_row_sees_one_epoch_of_clips() -> None:
    """Table 4, 1=>4=>8: whatever the batch sizes, the stages' clips are their shares of the epoch."""
    shares, batches = (0.644, 0.178, 0.178), (96, 24, 16)
    stages = [
        {"frames": frames, "share": share, "global_batch_size": batch}
        for frames, share, batch in zip((1, 4, 8), shares, batches, strict=True)
    ]
    plans = resolve_stages(experiment(stages, budget_epochs=1), {"a": 2_500_000}, 8)
    for plan, share, batch in zip(plans, shares, batches, strict=True):
        assert abs(plan.expected_clips - share * 2_500_000) <= batch / 2
        assert plan.expected_clips == plan.steps * batch
    assert [plan.frames for plan in plans] == [1, 4, 8]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_budget_in_clips_counts_accumulation_and_not_ranks(accumulation: int, world_size: int) -> None:
    config = experiment(
        [{"share": 0.25, "global_batch_size": 8}, {"share": 0.75, "global_batch_size": 4}],
        budget_clips=4800,
        gradient_accumulation_steps=accumulation,
    )
    first, second = resolve_stages(config, {"a": 1000}, world_size)
    assert first.steps == 1200 // (8 * accumulation) and second.steps == 3600 // (4 * accumulation)
    assert (first.expected_clips, second.expected_clips) == (1200, 3600)
    assert first.micro_batch_sizes == {"a": 8 // world_size}


def test_budget_in_clips_with_sources_of_unequal_weight_and_batch() -> None:
    config = experiment([{"share": 1.0, "batch_sizes": {"a": 4, "b": 16}}], {"a": 3.0, "b": 1.0}, budget_clips=7000)
    (plan,) = resolve_stages(config, {"a": 100, "b": 100}, 2)
    mean = 0.75 * 4 + 0.25 * 16
    assert plan.steps == 1000 and plan.expected_clips == 1000 * mean
    assert step_fractions(config.data) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("ends", "steps"),
    [
        ("first", 100 / 4 * 2),
        ("shortest", 60 / 2 * 2),
        ("longest", 300 / 30 * 2),
        ("all", 60 / 2 * 2),
    ],
)
def test_epoch_ends(ends: str, steps: float) -> None:
    config = experiment(
        [{"share": 1.0, "batch_sizes": {"a": 4, "b": 2, "c": 30}}],
        {"a": 1.0, "b": 1.0, "c": 1.0},
        data={"epoch_ends": ends},
        budget_epochs=2,
    )
    clips, batches = {"a": 100, "b": 60, "c": 300}, {"a": 4, "b": 2, "c": 30}
    per_epoch = steps_per_epoch(config.data, clips, batches)
    assert per_epoch == pytest.approx(steps / 2 * 3)
    (plan,) = resolve_stages(config, clips, 1)
    assert plan.steps == round(2 * per_epoch)


def test_a_source_of_weight_zero_does_not_hold_up_an_epoch() -> None:
    config = experiment(
        [{"share": 1.0, "global_batch_size": 5}], {"a": 1.0, "b": 0.0}, {"epoch_ends": "all"}, budget_epochs=1
    )
    (plan,) = resolve_stages(config, {"a": 50, "b": 1}, 1)
    assert plan.steps == 10 and plan.expected_clips == 50


def test_epochs_match_a_walk_through_round_robin() -> None:
    """Count the steps of a literal round robin until the awaited source has been read once."""
    clips, batches = {"a": 90, "b": 40}, {"a": 6, "b": 10}
    for ends, awaited in (("first", {"a"}), ("shortest", {"b"}), ("longest", {"a"}), ("all", {"a", "b"})):
        config = experiment(
            [{"share": 1.0, "batch_sizes": batches}], {"a": 1.0, "b": 1.0}, {"epoch_ends": ends}, budget_epochs=1
        )
        left, steps = dict(clips), 0
        while any(left[name] > 0 for name in awaited):
            name = ("a", "b")[steps % 2]
            left[name] -= batches[name]
            steps += 1
        (plan,) = resolve_stages(config, clips, 1)
        assert abs(plan.steps - steps) <= 1, ends


def test_images_stay_at_one_frame() -> None:
    config = experiment([{"frames": 8, "steps": 1, "global_batch_size": 2}], {"a": 1.0, "b": 1.0})
    (plan,) = resolve_stages(config, {"a": 10, "b": 10}, 1, image_sources={"b"})
    assert plan.frames == 8 and plan.source_frames == {"a": 8, "b": 1}


def test_a_stage_has_at_least_one_step() -> None:
    stages = [{"share": 0.999, "global_batch_size": 4}, {"share": 0.001, "global_batch_size": 4}]
    assert [plan.steps for plan in resolve_stages(experiment(stages, budget_clips=40), {"a": 10}, 1)] == [10, 1]


@pytest.mark.parametrize(
    ("stage", "clips", "world_size", "message"),
    [
        (
            {"global_batch_size": 6},
            100,
            4,
            r"^curriculum\.stages\[0\]\.global_batch_size: got 6 on 4 .*a multiple of 4",
        ),
        ({"batch_sizes": {"a": 6}}, 100, 4, r"^curriculum\.stages\[0\]\.batch_sizes\.a: got 6 on 4"),
        ({"global_batch_size": 6}, 5, 1, r"^curriculum\.stages\[0\]\.global_batch_size: got 6; allowed: at most 5"),
    ],
)
def test_batches_that_do_not_fit(stage: dict[str, Any], clips: int, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_stages(experiment([{"steps": 1, **stage}]), {"a": clips}, world_size)


@pytest.mark.parametrize(
    ("clips", "weights", "ends"),
    [
        ({"a": 24}, {"a": 1.0}, [6, 12, 18, 24]),
        ({"a": 23}, {"a": 1.0}, [6, 12, 18, 23]),  # an epoch of 5.75 steps ends in the 6th
        ({"a": 10, "b": 99}, {"a": 1.0, "b": 1.0}, [5, 10, 15, 20, 25]),
    ],
)
def test_an_epoch_ends_in_the_step_that_reads_its_last_clip(
    clips: dict[str, int], weights: dict[str, float], ends: list[int]
) -> None:
    (plan,) = resolve_stages(experiment([{"steps": 25, "global_batch_size": 4}], weights), clips, 1)
    assert [step for step in range(1, 26) if plan.ends_epoch(step)] == ends


def test_a_validation_loss_is_taken_over_the_first_sources_batch_in_the_last_stage() -> None:
    stages = [{"steps": 1, "global_batch_size": 4, "batch_sizes": {"b": 9}}, {"steps": 1, "batch_sizes": {"a": 6}}]
    config = experiment(stages, {"a": 1.0, "b": 1.0})
    assert loss_batch_size(config) == 6
    assert loss_batch_size(experiment(stages[:1], {"a": 1.0, "b": 1.0})) == 4
    assert loss_batch_size(experiment(stages[:1], {"b": 1.0})) == 9
    assert loss_batch_size(config_from_mapping({})) == 96


def test_the_config_package_does_not_import_torch() -> None:
    code = (
        "import sys, frozen_fast.config, frozen_fast.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
