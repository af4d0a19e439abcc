"""key.path=value on the command line."""

from __future__ import annotations

import pytest

from frozen_fast.config import config_from_mapping
from frozen_fast.config.overrides import merge, split_path
from frozen_fast.errors import UserError

TREE = {
    "data": {"sources": [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]},
    "curriculum": {"stages": [{"frames": 1, "share": 1.0}], "budget_clips": 100},
}


def test_split_path() -> None:
    assert split_path("data.sources[0].path") == ("data", "sources", 0, "path")
    assert split_path("a.batch_sizes.my-source") == ("a", "batch_sizes", "my-source")
    assert split_path("a[1][2]") == ("a", 1, 2)


@pytest.mark.parametrize("path", ["", ".a", "a.", "a..b", "[0]", "a[x]", "a[-1]", "a[0", "a[0]b", "a b", "a.[0]"])
def test_split_path_refuses(path: str) -> None:
    with pytest.raises(UserError, match="override: got the path"):
        split_path(path)


def test_values_are_yaml() -> None:
    config = config_from_mapping(
        TREE,
        [
            "optimizer.learning_rate=1e-4",
            "training.compile=true",
            "training.expected_world_size=2",
            "model.checkpoint=null",
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.betas[1]=0.95",
            "optimizer.fused=on",
            "evaluation.crops=3",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.training.compile is True and config.training.expected_world_size == 2
    assert config.model.checkpoint is None
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.optimizer.fused == "on" and config.evaluation.crops == 3
    with pytest.raises(UserError, match="^evaluation.crops: got 2, an integer; allowed: 1, 3"):
        config_from_mapping(TREE, ["evaluation.crops=2"])
    with pytest.raises(UserError, match="^evaluation.crops: got 'three'; allowed: 1, 3"):
        config_from_mapping(TREE, ["evaluation.crops=three"])


def test_text_keys_take_numbers_as_typed() -> None:
    overrides = ["name=007", "tracking.run_name=1e5", "paper_row=4", "data.sources[0].split_version="]
    config = config_from_mapping(TREE, overrides)
    assert (config.name, config.tracking.run_name, config.paper_row) == ("007", "1e5", "4")
    assert config.data.sources[0].split_version == ""


def test_later_overrides_win_and_equals_signs_stay() -> None:
    config = config_from_mapping(TREE, ["seed=1", "seed=2", "paper_row=1=>4"])
    assert config.seed == 2 and config.paper_row == "1=>4"


def test_list_items_are_set_appended_and_created() -> None:
    config = config_from_mapping(
        TREE,
        [
            "data.sources[1].path=c.jsonl",
            "data.sources[2]={name: d, path: d.jsonl}",
            "data.sources[3].path=e.jsonl",
            "evaluation.sources[0].path=f.jsonl",
            "evaluation.sources[0].split=val",
        ],
    )
    assert [source.path for source in config.data.sources] == ["a.jsonl", "c.jsonl", "d.jsonl", "e.jsonl"]
    assert config.data.sources[2].name == "d" and config.data.sources[3].name == "manifest"
    assert config.evaluation.sources[0].split == "val"


def test_mapping_values_merge_and_lists_replace() -> None:
    config = config_from_mapping(TREE, ["loss={temperature: 0.2}", "loss.chunk_rows=3", "data.sources=[{path: z}]"])
    assert (config.loss.temperature, config.loss.chunk_rows, config.loss.local) == (0.2, 3, True)
    assert [source.path for source in config.data.sources] == ["z"]


def test_batch_sizes_by_name_and_stage_switched_to_steps() -> None:
    overrides = ["curriculum.stages[0].batch_sizes.b=4", "curriculum.stages[0].batch_sizes.a=2"]
    stage = config_from_mapping(TREE, overrides).curriculum.stages[0]
    assert dict(stage.batch_sizes) == {"a": 2, "b": 4}
    overrides = ["curriculum.stages[0].share=null", "curriculum.stages[0].steps=3", "curriculum.budget_clips=null"]
    stage = config_from_mapping(TREE, overrides).curriculum.stages[0]
    assert stage.steps == 3 and stage.share is None


def test_the_default_of_a_list_is_reachable() -> None:
    assert config_from_mapping({}, ["curriculum.stages[0].frames=4"]).curriculum.stages[0].steps == 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override: got 'seed'; allowed: key.path=value"),
        ("--seed=1", "override: got the path '--seed'"),
        ("los.temperature=1", r"^los: got an unknown key \(did you mean loss\?\)"),
        ("loss.temp=1", r"^loss\.temp: got an unknown key .*command line"),
        ("data.sources[5].path=x", r"got index 5; allowed: 0 to 2, where 2 appends"),
        ("name[0]=x", "got an index on name, which is not a list"),
        ("data[0]=x", r"got an index on data, which is not a list; allowed: data\.KEY"),
        ("data.sources.path=x", "'path' below data.sources, which is a list"),
        ("seed.x=1", "'x' below seed, which is a single value"),
        ("loss.temperature=[1", "loss.temperature line 1 column .*not valid YAML"),
        ("loss.temperature=", r"^loss\.temperature: got null"),
        ("training.compile=1", r"^training\.compile: got 1, an integer; allowed: true or false \(command line\)"),
        ("data.decode.backend=dalii", r"did you mean 'dali'"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_mapping(TREE, [override])


def test_merge_shares_nothing_with_its_arguments() -> None:
    base, over = {"a": {"x": [1]}, "b": [2]}, {"a": {"y": [3]}}
    merged = merge(base, over)
    merged["a"]["x"].append(0)
    merged["a"]["y"].append(0)
    merged["b"].append(0)
    assert base == {"a": {"x": [1]}, "b": [2]} and over == {"a": {"y": [3]}}


def test_an_aliased_mapping_is_not_changed_twice() -> None:
    shared = {"path": "x"}
    config = config_from_mapping(
        {"data": {"sources": [shared]}, "evaluation": {"sources": [shared]}}, ["data.sources[0].path=y"]
    )
    assert config.data.sources[0].path == "y" and config.evaluation.sources[0].path == "x"
