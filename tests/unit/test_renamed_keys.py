"""Keys under former names: still read, said once, and never beside the new name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from frozen_fast.config import ExperimentConfig, config_from_mapping, load_config
from frozen_fast.config.fields import walk_keys
from frozen_fast.config.renamed import EXPERIMENT
from frozen_fast.errors import UserError
from frozen_fast.sweep.sweep_file import read_sweep

OLD = """
data:
  sources: [{format: webvid, path: a, cut: 2M}, {format: msrvtt, path: b, cut: full}]
  decode: {max_image_pixels: 9}
evaluation: {sources: [{format: msrvtt, path: c, cut: 1k-B}]}
wandb: {mode: offline, project: p, name: n}
"""


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a test that has set the package's logging up."""
    monkeypatch.setattr(logging.getLogger("frozen_fast"), "propagate", True)


def test_old_keys_are_read_with_a_warning_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    config = load_config(path)
    assert [source.split_version for source in config.data.sources] == ["2M", "full"]
    assert config.evaluation.sources[0].split_version == "1k-B"
    assert config.data.decode.max_pixels == 9
    assert (config.tracking.trackers, config.tracking.wandb_mode) == (("wandb",), "offline")
    assert (config.tracking.project, config.tracking.run_name) == ("p", "n")
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 7
    assert f"data.sources[1].cut ({path} line 3) was renamed, use data.sources[1].split_version" in messages
    assert f"wandb.mode ({path} line 6) was renamed, use tracking.trackers and tracking.wandb_mode" in messages


def test_old_keys_in_overrides() -> None:
    tree = {"data": {"sources": [{"format": "webvid", "path": "a", "split_version": "2M"}]}}
    overrides = ["data.sources[0].cut=10M", "data.decode={max_image_pixels: 9}", "wandb.mode=online", "wandb.name=1e5"]
    config = config_from_mapping(tree, overrides)
    assert config.data.sources[0].split_version == "10M" and config.data.decode.max_pixels == 9
    assert (config.tracking.trackers, config.tracking.run_name) == (("wandb",), "1e5")
    assert config_from_mapping(tree, [*overrides, "wandb.mode=off"]).tracking.trackers == ()


def test_a_file_may_replace_an_old_key_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {decode: {max_image_pixels: 9}}\nwandb: {mode: online}")
    (tmp_path / "new.yaml").write_text("extends: base.yaml\ndata: {decode: {max_pixels: 8}}\nwandb: {mode: off}")
    config = load_config(tmp_path / "new.yaml")
    assert config.data.decode.max_pixels == 8 and config.tracking.trackers == ()


def test_both_names_are_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^data\.decode\.max_image_pixels: got 9 beside data\.decode\.max_pixels"):
        config_from_mapping({"data": {"decode": {"max_image_pixels": 9, "max_pixels": 8}}})


def test_a_wrong_value_is_told_under_the_new_name_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data:\n  decode: {max_image_pixels: many}")
    with pytest.raises(UserError, match=r"^data\.decode\.max_pixels: got 'many', text; allowed: an integer .*line 2"):
        load_config(tmp_path / "x.yaml")


def test_new_names_exist_and_old_ones_do_not() -> None:
    known = {path for path, _ in walk_keys(ExperimentConfig)}
    assert known & set(EXPERIMENT) == {"model.video.attention"}, "whose values are renamed"
    targets = [new if isinstance(new, str) else new("online") for new in EXPERIMENT.values()]
    assert {path for target in targets for path in ([target] if isinstance(target, str) else target)} <= known


@pytest.mark.parametrize("old", ["native", "batched"])
def test_old_values_are_read_with_a_warning(old: str, caplog: pytest.LogCaptureFixture) -> None:
    tree = {"model": {"video": {"attention": old}}}
    assert config_from_mapping(tree).model.video.attention == "cpu_c"
    assert config_from_mapping({}, [f"model.video.attention={old}"]).model.video.attention == "cpu_c"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"model.video.attention={old} was renamed, use model.video.attention=cpu_c",
        f"model.video.attention={old} (command line) was renamed, use model.video.attention=cpu_c",
    ]
    caplog.clear()
    assert config_from_mapping({"model": {"video": {"attention": "sdpa"}}}).model.video.attention == "sdpa"
    with pytest.raises(UserError, match="model.video.attention: got 5, an integer"):
        config_from_mapping({"model": {"video": {"attention": 5}}})
    assert not caplog.records


def test_old_keys_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("experiment: x.yaml\nwandb: offline\nwandb_project: p\naxes: {seed: [1, 2]}")
    sweep = read_sweep(path)
    assert (sweep.tracking.trackers, sweep.tracking.wandb_mode, sweep.tracking.project) == (("wandb",), "offline", "p")
    assert read_sweep(path, ["wandb=off"]).tracking.trackers == ()
