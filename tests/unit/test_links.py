"""Run folders and caches are never written through symbolic links that lead out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from frozen_fast.common.files import append_text, open_lock, overwrite, write_atomically
from frozen_fast.errors import UserError
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.records.run_lock import RunLock
from frozen_kernels import divided_attention
from frozen_kernels.attention.selection import CACHE_FILE, forget_choices


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    return tmp_path / "outside"


@pytest.mark.parametrize("name", ["steps.jsonl", "status.json", "run.lock", "checkpoints", "hangs", "checkpoints/best"])
def test_a_run_folder_with_a_link_out_of_it_is_refused(tmp_path: Path, outside: Path, name: str) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if name in ("checkpoints", "hangs") else outside / "precious")
    with pytest.raises(UserError, match=f"^run_folder: got .*run', in which {name} is a symbolic link to .*outside"):
        RunFolder(tmp_path / "run").create()
    assert [path.read_text() for path in outside.iterdir()] == ["precious"]


def test_links_that_stay_inside_and_a_link_to_the_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "run")
    folder.create()
    (folder.checkpoints / "step_00000001").mkdir()
    (folder.checkpoints / "best").symlink_to("step_00000001")
    folder.create()
    RunLock(folder).acquire()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: append_text(path, "x"),
        lambda path: overwrite(path, "x"),
        open_lock,
        lambda path: RunLock(RunFolder(path.parent)).acquire(),
    ],
    ids=["append", "overwrite", "open_lock", "run lock"],
)
def test_a_link_that_comes_later_is_not_followed(tmp_path: Path, outside: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "run.lock").symlink_to(outside / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "run.lock")
    assert (outside / "precious").read_text() == "precious"


def test_an_atomic_write_replaces_a_link_and_leaves_its_target(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "status.json").symlink_to(outside / "precious")
    write_atomically(tmp_path / "status.json", "new")
    assert (tmp_path / "status.json").read_text() == "new" and (outside / "precious").read_text() == "precious"
    (tmp_path / f".other.{os.getpid()}.tmp").symlink_to(outside / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "other", "new")
    assert (outside / "precious").read_text() == "precious"


def attend(seed: int) -> None:
    forget_choices()  # another test of this process may have used the same sizes
    qkv = torch.randn(1, 1 + 2 * 4, 3, 2, 8 + 8 * seed)
    divided_attention(qkv, 2, "time")


@pytest.mark.parametrize("name", [CACHE_FILE, CACHE_FILE.replace(".json", ".lock")])
def test_the_cache_of_choices_is_not_written_through_a_link(
    tmp_path: Path, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).symlink_to(outside / "precious")
    attend(0 if name == CACHE_FILE else 1)
    assert (outside / "precious").read_text() == "precious"
    assert "cannot be written, so nothing is measured" in caplog.text


DAMAGED = (3, "sdpa", [], {"backend": 7}, {"backend": "nowhere"}, None)


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_a_damaged_cache_of_choices_is_measured_anew(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frozen_kernels.attention import selection

    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path))

    class Everything(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: object = None) -> object:
            return DAMAGED[number]

    monkeypatch.setattr(selection, "_read_choices", lambda path: Everything())
    attend(2 + number)
    assert json.loads((tmp_path / CACHE_FILE).read_text())
