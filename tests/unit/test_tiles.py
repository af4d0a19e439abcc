"""Tile shapes of the Triton kernels: the tables' writing and reading, and the sweep that fills them, without a GPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from frozen_kernels.attention import tiles
from frozen_kernels.attention.qkv_layout import Layout
from frozen_kernels.attention.tiles import Tile, case_key, forced, read_table, rule, tile_of, write_table

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = Layout(24, 4, 196, 12, 64)
HOPPER, GPU = (9, 0), torch.device("cuda", 0)
OTHER = Tile(16, 0, 2, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a GPU of capability 9.0."""
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "compute_capability", lambda device: HOPPER)
    tiles._settled.cache_clear()
    yield tmp_path
    tiles._settled.cache_clear()


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("attention_tiles")


def test_a_written_entry_is_what_the_kernels_take_for_its_case_alone(cache: Path) -> None:
    usual = rule("time", LAYOUT, torch.bfloat16)
    assert tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU) == usual != OTHER
    path = write_table(HOPPER, {case_key("time", "forward", LAYOUT, torch.bfloat16): OTHER}, {"device": "H200"})
    assert path == cache / "attention_tiles_sm_90.json"
    assert json.loads(path.read_text())["about"] == {"device": "H200"}
    assert tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU) == OTHER, "in the same process too"
    assert tile_of("time", "backward", LAYOUT, torch.bfloat16, GPU) == usual
    assert tile_of("time", "forward", LAYOUT, torch.float32, GPU) == usual
    assert tile_of("time", "forward", Layout(24, 8, 196, 12, 64), torch.bfloat16, GPU) != OTHER
    assert tile_of("time", "forward", LAYOUT, torch.bfloat16, torch.device("meta")) == usual
    assert read_table((8, 0)) == {}


def test_a_case_is_measured_for_any_batch_and_on_the_space_axis_for_any_number_of_frames() -> None:
    write_table(HOPPER, {case_key("space", "backward", LAYOUT, torch.bfloat16): Tile(32, 64, 8, 2)}, {})
    other = Layout(3, 1, 196, 6, 64)
    assert tile_of("space", "backward", other, torch.bfloat16, GPU) == Tile(32, 64, 8, 2)


def test_a_second_sweep_adds_to_the_table_and_replaces_its_own_cases() -> None:
    first, second = (case_key("time", "forward", Layout(1, frames, 196, 1, 64), torch.bfloat16) for frames in (4, 8))
    write_table(HOPPER, {first: OTHER, second: OTHER}, {})
    write_table(HOPPER, {second: Tile(4, 0, 4, 1)}, {})
    assert read_table(HOPPER) == {first: OTHER, second: Tile(4, 0, 4, 1)}


@pytest.mark.parametrize(
    "text",
    [
        '{"tiles": {"a": ',
        "[]",
        '{"tiles": {"a": {"rows": 16, "keys": 0, "warps": 4}}}',
        '{"tiles": {"a": {"rows": 12, "keys": 0, "warps": 4, "stages": 1}}}',
        '{"tiles": {"a": {"rows": 16, "keys": 0, "warps": 0, "stages": 1}}}',
    ],
)
def test_a_damaged_table_is_named_and_the_rule_holds(text: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "attention_tiles_sm_90.json").write_text(text)
    with caplog.at_level("WARNING", logger="frozen_kernels"):
        tile = tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU)
    assert tile == rule("time", LAYOUT, torch.bfloat16)
    assert "attention_tiles_sm_90.json is not a table of tiles" in caplog.text


def test_a_table_beside_the_kernels_serves_machines_without_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(HOPPER, {case_key("time", "forward", LAYOUT, torch.bfloat16): OTHER}, {})
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(tiles, "__file__", str(path.parent / "tiles.py"))
    assert tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU) == OTHER


def test_the_sweep_keeps_the_fastest_of_the_right_ones(sweeps: ModuleType) -> None:
    tried = [Tile(8, 0, 4, 1), Tile(16, 0, 4, 1), Tile(32, 0, 4, 1), Tile(64, 0, 4, 1)]
    milliseconds = {8: 3.0, 16: 2.0, 32: 1.0}

    def run() -> Tensor:
        tile = tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU)
        if tile.rows == 64:
            raise MemoryError("out of shared memory")
        return torch.full((3,), 1.5 if tile.rows == 32 else 1.0)

    def timer(
        steps: Mapping[str, Callable[[], object]], device: torch.device
    ) -> tuple[dict[str, object], dict[str, str]]:
        for step in steps.values():
            step()
        found = {name: milliseconds[tried[int(name)].rows] for name in steps}
        return {name: importlib.import_module("measure").summarize([time]) for name, time in found.items()}, {}

    best, rows = sweeps.sweep("time", "forward", tried, run, torch.device("cpu"), timer)
    assert best == tried[1], "32 rows are faster, and wrong"
    assert [row.get("failed") for row in rows] == [
        None,
        None,
        "ValueError: the result differs by 0.5 of the largest value",
        "MemoryError: out of shared memory",
    ]
    assert tile_of("time", "forward", LAYOUT, torch.bfloat16, GPU) == rule("time", LAYOUT, torch.bfloat16)


def test_where_every_tile_fails_nothing_is_chosen(sweeps: ModuleType) -> None:
    def run() -> Tensor:
        raise RuntimeError("no kernel")

    best, rows = sweeps.sweep("space", "forward", [Tile(16, 16, 4, 1)], run, torch.device("cpu"))
    assert best is None and rows[0]["failed"] == "RuntimeError: no kernel"


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("patches", [4, 196])
def test_candidates_hold_the_rule_once_and_fit_the_patches(axis: str, patches: int, sweeps: ModuleType) -> None:
    layout = Layout(1, 4, patches, 1, 64)
    found = sweeps.candidates(axis, layout, torch.bfloat16)
    assert found[0] == rule(axis, layout, torch.bfloat16) and len(set(found)) == len(found) > 1
    assert all(max(tile.rows, tile.keys) <= max(16, 256 if patches == 196 else 4) for tile in found)


def test_forced_tiles_end_with_their_block() -> None:
    with forced("time", "forward", OTHER):
        assert tile_of("time", "forward", LAYOUT, torch.float32, torch.device("cpu")) == OTHER
    assert tile_of("time", "forward", LAYOUT, torch.float32, torch.device("cpu")) != OTHER


def test_tune_without_cuda_is_one_line(
    sweeps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module("attention")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu", "cuda"):
        assert benchmark.main(["--tune", "--device", device, "--output", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == "error: --tune: needs a CUDA GPU, and this machine has none\n"
    assert not (tmp_path / "out").exists()
