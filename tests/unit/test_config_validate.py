"""Ranges, and keys that must agree."""

from __future__ import annotations

import re
from typing import Any

import pytest

from frozen_fast.config import check_for_evaluation, check_for_training, config_from_mapping
from frozen_fast.config.fields import optional_type, range_in_words, walk_keys
from frozen_fast.config.schema import ExperimentConfig, LossConfig
from frozen_fast.errors import UserError, UserErrors

TREE = {
    "data": {"sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]},
    "curriculum": {"stages": [{"frames": 1, "share": 0.5}, {"frames": 4, "share": 0.5}], "budget_epochs": 1},
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=' '"], r"^name: got ' '; allowed: text that is not empty"),
        (["seed=-1"], r"^seed: got -1; allowed: 0 to"),
        (["run_folder=runs/{nam}"], r"^run_folder: got 'runs/\{nam\}'; allowed: .*\{name\}"),
        (["run_folder=runs/{"], r"^run_folder: got"),
        (["loss.temperature=0"], r"^loss\.temperature: got 0; allowed: more than 0"),
        (["optimizer.learning_rate=-1"], r"^optimizer\.learning_rate: got -1; allowed: more than 0"),
        (["optimizer.betas=[0.9, 1.0]"], r"^optimizer\.betas\[1\]: got 1\.0; allowed: 0 or more, below 1"),
        (["data.augmentation.crop_scale=[0.9, 0.5]"], r"^data\.augmentation\.crop_scale: got \[0\.9, 0\.5\]"),
        (["data.augmentation.crop_scale=[0, 1]"], r"crop_scale"),
        (["data.augmentation.crop_scale=[0.5, 1.1]"], r"crop_scale"),
        (["data.augmentation.crop_ratio=[2, 1]"], r"crop_ratio"),
        (["data.augmentation.horizontal_flip=1.5"], r"horizontal_flip: got 1\.5; allowed: 0 to 1"),
        (["data.augmentation.std[2]=0"], r"^data\.augmentation\.std\[2\]: got 0;"),
        (["data.decode.max_bad_share=2"], r"max_bad_share"),
        (["data.decode.threads=0"], r"^data\.decode\.threads: got 0; allowed: 1 or more"),
        (["data.sources[1].path="], r"^data\.sources\[1\]\.path: got ''"),
        (["data.sources[1].name=a"], r"^data\.sources: got 2 sources called 'a'"),
        (["data.sources[1].weight=-1"], r"^data\.sources\[1\]\.weight"),
        (["data.sources[0].format=webvids"], r"^data\.sources\[0\]\.format: got 'webvids' \(did you mean 'webvid'\?\)"),
        (["curriculum.stages=[]"], r"^curriculum\.stages: got none"),
        (["curriculum.stages[0].frames=8"], r"stages\[1\]\.frames: got 4; allowed: 8 or more"),
        (["curriculum.stages[0].frames=0"], r"stages\[0\]\.frames: got 0"),
        (["curriculum.stages[0].global_batch_size=0"], r"global_batch_size: got 0"),
        (["curriculum.stages[1].batch_sizes.b=0"], r"stages\[1\]\.batch_sizes\.b: got 0"),
        (["curriculum.stages[1].batch_sizes.c=1"], r"stages\[1\]\.batch_sizes: got 'c'.*allowed: a, b"),
        (["curriculum.stages[0].steps=5"], r"stages\[0\]: got share 0\.5 and steps 5; allowed: exactly one"),
        (["curriculum.stages[0].share=null"], r"stages\[0\]: got neither share nor steps"),
        (["curriculum.stages[0].share=0.4"], r"shares that sum to 0\.9; allowed: a sum of 1"),
        (["curriculum.stages[0].share=0"], r"stages\[0\]\.share: got 0"),
        (["curriculum.budget_clips=5"], r"got both of budget_clips, budget_epochs"),
        (["curriculum.budget_epochs=null"], r"got neither of budget_clips, budget_epochs"),
        (["curriculum.budget_epochs=0"], r"budget_epochs: got 0"),
        (["curriculum.stages=[{steps: 3}]"], r"budget_epochs: got 1\.0, but no stage has a share"),
        (["curriculum.gradient_accumulation_steps=0"], r"gradient_accumulation_steps: got 0"),
        (["training.expected_world_size=0"], r"expected_world_size: got 0"),
        (["evaluation.frames=0"], r"evaluation\.frames: got 0"),
        (["evaluation.batch_size=0"], r"evaluation\.batch_size: got 0"),
        (["checkpoints.keep=0"], r"checkpoints\.keep: got 0"),
    ],
)
def test_what_does_not_agree_is_named(overrides: list[str], message: str) -> None:
    config_from_mapping(TREE)
    with pytest.raises(UserError) as caught:
        config_from_mapping(TREE, overrides)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    mistakes = [
        "seed=x",
        "model.video.size=garbage",
        "loss.temprature=1",
        "optimizer.betas=[0.9, 1.5]",
        "data.sources[1].name=a",
        "curriculum.budget_epochs=null",
        "evaluation.keep_best=validation_loss",
    ]
    with pytest.raises(UserErrors) as caught:
        config_from_mapping(TREE, mistakes)
    lines = str(caught.value).splitlines()
    fields = [line.split(":")[0] for line in lines]
    assert fields == [
        "seed",
        "model.video.size",
        "data.sources",
        "curriculum",
        "optimizer.betas[1]",
        "loss.temprature",
        "evaluation.keep_best",
    ]
    assert all(": got " in line and "; allowed" in line for line in lines)


def test_a_name_is_checked_against_its_table() -> None:
    with pytest.raises(UserError, match=r"^model\.video\.size: got .* \(did you mean 'base_patch16_224'\?\)"):
        config_from_mapping({"model": {"video": {"size": "base_patch16"}}})


def test_names_and_limits_hold_in_python_too() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        LossConfig(temperature=0.0)
    with pytest.raises(ValueError, match="valid integer"):
        ExperimentConfig(seed="1")  # type: ignore[arg-type]


def test_shares_beside_steps_are_allowed() -> None:
    stages = [{"frames": 1, "share": 1.0}, {"frames": 4, "steps": 5}]
    config_from_mapping({"curriculum": {"stages": stages, "budget_clips": 10}})


ANY_NUMBER = {"loss.sigmoid_bias"}
"""Numeric keys without limits."""


def test_every_number_has_a_range() -> None:
    for path, info in walk_keys(ExperimentConfig):
        if path not in ANY_NUMBER and (optional_type(info.type) or info.type) in (int, float):
            assert range_in_words(info.limits), path


def test_training_and_evaluation_need_sources() -> None:
    config = config_from_mapping({})
    with pytest.raises(UserError, match=r"^data\.sources: got none"):
        check_for_training(config)
    with pytest.raises(UserError, match=r"^evaluation\.sources: got none"):
        check_for_evaluation(config)
    check_for_training(config_from_mapping(TREE))
    check_for_evaluation(config_from_mapping({"evaluation": {"sources": [{"path": "x"}]}}))
    zero = [f"data.sources[{index}].weight=0" for index in range(2)]
    with pytest.raises(UserError, match="weight 0 for every source"):
        check_for_training(config_from_mapping(TREE, zero))
    with pytest.raises(UserError, match=r"^data\.epoch_ends: got 'first'"):
        check_for_training(config_from_mapping(TREE, zero[:1]))
    check_for_training(config_from_mapping(TREE, [*zero[:1], "data.epoch_ends=all"]))


@pytest.mark.parametrize("evaluation", [{}, {"sources": [{"path": "x"}], "every": "never"}])
def test_a_best_checkpoint_needs_evaluations(evaluation: dict[str, Any]) -> None:
    tree = {"evaluation": {"keep_best": "t2v/R@1", **evaluation}}
    with pytest.raises(UserError, match=r"^evaluation\.keep_best: got 't2v/R@1' with .*; allowed: none, or something"):
        config_from_mapping(tree)
