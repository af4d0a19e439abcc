"""Strict YAML into the schema: what is read, what is refused, and how the message says it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from frozen_fast.config import ExperimentConfig, config_from_mapping, dump_yaml, load_config, to_plain
from frozen_fast.config.dump import docs_markdown, help_text
from frozen_fast.config.fields import keys_of, walk_keys
from frozen_fast.config.model_defaults import with_model_defaults
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> ExperimentConfig:
    return load_config(write(folder, text))


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == replace(ExperimentConfig(), model=with_model_defaults(ModelConfig()))


def test_values_of_every_kind(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        name: a run
        paper_row: "1=>4"
        model: {checkpoint: null, text: {tokenizer: folder}}
        data:
          sources:
            - {name: clips, path: a.jsonl, weight: 2}
            - {path: b.jsonl}
          decode: {max_pixels: 1_000}
          augmentation: {crop_scale: [0.25, 1]}
        curriculum:
          stages: [{frames: 4, batch_sizes: {clips: 8, manifest: 16}, steps: 3}]
        optimizer: {learning_rate: 1e-5, eps: 1E-8, fused: on}
        training: {compile: true}
        tracking: {trackers: [wandb, tensorboard], wandb_mode: offline}
        """,
    )
    assert config.paper_row == "1=>4"
    assert config.model.text.tokenizer == "folder" and config.model.checkpoint is None
    assert [source.name for source in config.data.sources] == ["clips", "manifest"]
    assert config.data.sources[0].weight == 2.0 and isinstance(config.data.sources[0].weight, float)
    assert config.data.decode.max_pixels == 1000
    assert config.data.augmentation.crop_scale == (0.25, 1.0)
    assert config.curriculum.stages[0].batch_sizes == (("clips", 8), ("manifest", 16))
    assert config.optimizer.learning_rate == 1e-5 and config.optimizer.eps == 1e-8
    assert config.optimizer.fused == "on" and config.tracking.trackers == ("wandb", "tensorboard")
    assert config.training.compile is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {temprature: 1.0}", r"^loss\.temprature: .*unknown key.*did you mean loss\.temperature\?.*line 1"),
        ("learning_rate: 1.0", r"did you mean optimizer\.learning_rate\?"),
        ("data:\n  sources:\n  - {path: x}\n  - {pth: y}", r"^data\.sources\[1\]\.pth: .*sources\[1\]\.path.*line 4"),
        ("seed: true", r"^seed: got true; allowed: an integer"),
        ("seed: 1.0", r"^seed: got 1\.0, a number; allowed: an integer"),
        ("seed: '1'", r"^seed: got '1', text; allowed: an integer"),
        ("name: 5", r"^name: got 5, an integer; allowed: text"),
        ("name:", r"^name: got null"),
        ("loss:", r"^loss: got null .*; allowed: a mapping of keys .*line 1"),
        ("loss: [1]", r"^loss: got a list of 1 items; allowed: a mapping"),
        ("loss: {temperature: hot}", r"^loss\.temperature: got 'hot', text; allowed: a number"),
        ("loss: {temperature: '0.1'}", r"^loss\.temperature: got '0\.1', text; allowed: a number"),
        ("loss: {temperature: false}", r"^loss\.temperature: got false; allowed: a number"),
        ("loss: {temperature: .nan}", r"^loss\.temperature: .*a finite number"),
        ("training: {compile: yes}", r"^training\.compile: got 'yes', text; allowed: true or false"),
        ("training: {compile: 1}", r"^training\.compile: got 1, an integer; allowed: true or false"),
        ("paper_row: 4", r"^paper_row: got 4, an integer; allowed: none, 1, 4"),
        ("data: {decode: {backend: dalli}}", r"^data\.decode\.backend: got 'dalli' \(did you mean 'dali'\?\)"),
        ("optimizer: {betas: [0.9]}", r"^optimizer\.betas: got a list of 1 items; allowed: a list of 2 numbers"),
        ("optimizer: {betas: 0.9}", r"^optimizer\.betas: got 0\.9, a number; allowed: a list of 2 numbers"),
        ("optimizer: {betas: [0.9, x]}", r"^optimizer\.betas\[1\]: got 'x'"),
        ("data: {sources: x.jsonl}", r"^data\.sources: got 'x\.jsonl', text; allowed: a list of mappings"),
        ("curriculum: {stages: [{steps: 1, batch_sizes: [8]}]}", r"batch_sizes: .*a mapping from names to integers"),
        ("curriculum: {stages: [{steps: 1, batch_sizes: {a: 8.5}}]}", r"batch_sizes\.a: got 8\.5"),
        ("- a\n- b", r"got a list at the top; allowed: a mapping"),
        ("just text", r"got a str at the top; allowed: a mapping"),
        ("seed: 1\nloss: {}\nseed: 2", r"line 3: seed is given twice, first on line 1"),
        ("loss:\n  local: true\n  local: false", r"line 3: loss\.local is given twice, first on line 2"),
        ("a: [1, 2\nb: 3", r"line 2 column \d+: not valid YAML"),
        ("a: b: c", r"line 1 column \d+: not valid YAML"),
        ("seed: 1\n\tname: x", r"line 2 .*not valid YAML"),
        ('name: "a\x00b"', r"not valid YAML"),
        ("1: 2", r"line 1: got the key '1'; allowed: text"),
        ("a: &x {b: *x}", r"an alias refers to what contains it"),
        ("a: &x {seed: 1}\n<<: *x", r"got '<<'"),
        ("name: !!python/object/apply:os.getcwd []", r"not valid YAML: could not determine a constructor"),
        ("seed: 010", r"^seed: got '010', text"),
        ("name: 2020-01-01T", None),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str | None) -> None:
    if message is None:
        load(tmp_path, text)
        return
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


LAUGHS = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in pairwise("abcdefghijklmnopqrstuvwxyz"))
DEEP = 3000
LIMITS = [
    (LAUGHS, r"got more than 100000 values"),
    ("name: " + "[" * DEEP + "]" * DEEP, r"line 1: got more than 50 levels; allowed: 50"),
    ("name: " + "{a: " * DEEP + "1" + "}" * DEEP, r"line 1: got more than 50 levels"),
    ("\n".join(" " * level + "a:" for level in range(DEEP)), r"line 50: got more than 50 levels"),
    ("name: " + "[" * DEEP, r"got more than 50 levels"),
]


@pytest.mark.parametrize(("text", "message"), LIMITS)
def test_documents_too_deep_or_too_large_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    """Within a time that leaves no room for 2 ** 26 values; pytest-timeout ends a test that tries them."""
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=" + "[" * DEEP, "^name line 1: got more than 50 levels"),
        ("name=" + "[" * DEEP + "]" * DEEP, "^name line 1: got more than 50 levels"),
        (".".join("a" * DEEP) + "=1", "^override: got a path of 3000 steps"),
        ("name" + "[0]" * DEEP + "=1", "^override: got a path of 3001 steps"),
    ],
)
def test_overrides_too_deep_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_mapping({}, [override])
    assert len(str(caught.value)) < 500


def test_a_file_too_deep_exits_with_2(tmp_path: Path) -> None:
    path = write(tmp_path, LIMITS[1][0])
    command = [sys.executable, "-m", "frozen_fast", "train", "--config", str(path), "--print-config"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_missing_file_folder_and_binary_file(tmp_path: Path) -> None:
    write(tmp_path, "", "webvid.yaml")
    with pytest.raises(
        UserError, match=r"webvdi\.yaml'; allowed: a YAML file that exists \(did you mean .*webvid\.yaml"
    ):
        load_config(tmp_path / "webvdi.yaml")
    with pytest.raises(UserError, match="folder .* does not exist"):
        load_config(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(UserError, match="a folder; allowed: a YAML file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "seed: 1\nloss: {temperature: 0.1, chunk_rows: 4}\noptimizer: {betas: [0.1, 0.2]}", "deep/a.yaml")
    write(tmp_path, "seed: 2\ntraining: {compile: true}", "deep/b.yaml")
    write(tmp_path, "extends: [a.yaml, b.yaml]\nname: c", "deep/c.yaml")
    config = load(tmp_path, "extends: deep/c.yaml\nloss: {temperature: 0.2}\noptimizer: {betas: [0.5, 0.6]}")
    assert (config.seed, config.name, config.training.compile) == (2, "c", True)
    assert (config.loss.temperature, config.loss.chunk_rows) == (0.2, 4)
    assert config.optimizer.betas == (0.5, 0.6)


def test_extends_names_cycles_and_missing_bases(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: ./a.yaml", "b.yaml")
    with pytest.raises(UserError, match=r"cycle, a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="none.yaml"):
        load(tmp_path, "extends: none.yaml")
    with pytest.raises(UserError, match="extends: got 3"):
        load(tmp_path, "extends: 3")


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, "\nseed: x", "base.yaml")
    with pytest.raises(UserError, match=r"base\.yaml line 2"):
        load(tmp_path, "extends: base.yaml")


def test_config_from_mapping_leaves_its_argument_alone() -> None:
    tree = {"optimizer": {"betas": [0.1, 0.2]}}
    config = config_from_mapping(tree, ["optimizer.betas[0]=0.3"])
    assert config.optimizer.betas == (0.3, 0.2)
    assert tree == {"optimizer": {"betas": [0.1, 0.2]}}


def unusual(cls: type) -> dict[str, Any]:
    """For each key of the schema a valid value that is not the default, where one is easily made."""
    values: dict[str, Any] = {}
    for info in keys_of(cls):
        if info.is_section:
            values[info.name] = unusual(info.type)
        elif info.type is bool:
            values[info.name] = not info.default
    return values


@pytest.mark.parametrize("meanings", [False, True])
def test_dump_reads_back_as_the_same_config(tmp_path: Path, meanings: bool) -> None:
    tree = unusual(ExperimentConfig)
    tree |= {"name": "on", "run_folder": "1e5", "seed": 7}
    tree["tracking"] = {"trackers": ["wandb"], "project": "12:30", "run_name": "null"}
    tree["data"] |= {"sources": [{"path": "x # y: [z"}, {"path": "ünï", "name": "b", "split": "0x1"}]}
    tree["curriculum"] = {"stages": [{"steps": 2, "batch_sizes": {"b": 2}}, {"steps": 1, "frames": 2}]}
    tree["optimizer"] = {"learning_rate": 1e-7, "eps": 1e-12}
    config = config_from_mapping(tree)
    text = dump_yaml(config, meanings=meanings)
    assert load(tmp_path, text) == config
    plain = yaml.safe_load(text)
    assert plain == to_plain(config), "other YAML readers must see the same values"
    if meanings:
        assert "# infonce and sigmoid: divides the similarities" in text


def test_every_key_has_a_meaning_and_appears_in_help() -> None:
    text = help_text()
    for path, info in walk_keys(ExperimentConfig):
        assert info.meaning, path
        assert path in text


def test_schema_is_frozen_and_keyword_only() -> None:
    seen = {info.type for _, info in walk_keys(ExperimentConfig) if info.is_section}
    for cls in {ExperimentConfig, *seen}:
        assert is_dataclass(cls) and cls.__dataclass_params__.frozen and cls.__doc__  # type: ignore[attr-defined]
        assert all(entry.kw_only for entry in fields(cls))


def test_docs_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == docs_markdown(), "run: python -m frozen_fast config-docs"
