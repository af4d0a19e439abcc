"""Config values under their former names: read, with a warning that names the present one."""

from __future__ import annotations

import logging

import pytest

from frozen_fast.config import config_from_mapping
from frozen_fast.config.renamed_values import replace_renamed_values


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("frozen_fast"), "propagate", True)
    return caplog


@pytest.mark.parametrize("old", ["native", "batched"])
def test_an_attention_backends_old_name_is_read(old: str, warnings: pytest.LogCaptureFixture) -> None:
    in_a_file = config_from_mapping({"model": {"video": {"attention": old}}})
    as_an_override = config_from_mapping({}, [f"model.video.attention={old}"])
    assert in_a_file.model.video.attention == as_an_override.model.video.attention == "cpu_c"
    assert [record.getMessage() for record in warnings.records] == [
        f"model.video.attention={old} is an old name; cpu_c is used"
    ] * 2


@pytest.mark.parametrize("tree", [{}, {"model": None}, {"model": {"video": {"attention": "sdpa"}}}])
def test_whatever_else_stays_as_it_is(tree: dict[str, object], warnings: pytest.LogCaptureFixture) -> None:
    assert replace_renamed_values(tree) is tree and not warnings.records


def test_the_tree_that_is_passed_is_not_changed() -> None:
    tree = {"model": {"video": {"attention": "native", "size": "x"}, "kind": "y"}}
    assert replace_renamed_values(tree) == {"model": {"video": {"attention": "cpu_c", "size": "x"}, "kind": "y"}}
    assert tree["model"]["video"]["attention"] == "native"  # type: ignore[index]
