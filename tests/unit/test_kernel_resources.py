"""The table of what Triton kernels take of a GPU: that of these sources, without spills, and read rightly."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/results/kernel_resources.json"


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernel_resources

    return kernel_resources


def test_the_committed_table_is_of_these_sources_and_nothing_spills(resources: ModuleType) -> None:
    table = json.loads(TABLE.read_text())
    command = "python benchmarks/kernel_resources.py --output benchmarks/results/kernel_resources.json"
    assert set(table["architectures"]) == {"80", "90", "100"}
    assert resources.problems(table["kernels"]) == []
    assert all(row["warps_resident"] >= row["warps_of_a_block"] for row in table["kernels"])
    launches: dict[object, object] = {}
    for name, case in resources.cases().items():
        with resources.captured(name, launches):
            case()
    assert table["sources"] == resources.sources_hash(launches.values()), f"the kernels have changed: run {command}"
    assert len(table["kernels"]) == 3 * len(launches)


def test_a_kernel_is_compiled_and_read(resources: ModuleType) -> None:
    """bias_gelu's backward pass on an architecture that this machine does not have."""
    launches: dict[object, object] = {}
    with resources.captured("gelu", launches):
        resources.cases()["gelu D=3072 bf16"]()
    forward, backward = launches.values()
    assert dict(forward.signature)["x"] == "*bf16" and dict(forward.signature)["ROWS"] == "constexpr"
    row = resources.compile_launch(backward, resources.ARCHITECTURES[80])
    assert row["kernel"] == "backward_kernel" and 16 < row["registers"] < 128 and row["spill_store_bytes"] == 0
    assert row["instructions"] > 100 and row["matrix_instructions"] == 0
    assert sum(row["loads_by_bytes_of_a_thread"].values()) >= 2


def test_spills_and_too_much_shared_memory_are_problems(resources: ModuleType) -> None:
    good = {
        "kernel": "k",
        "case": "c",
        "capability": 90,
        "shared_bytes": 227 << 10,
        "spill_store_bytes": 0,
        "spill_load_bytes": 0,
    }
    assert resources.problems([good]) == []
    found = resources.problems([{**good, "spill_load_bytes": 8}, {**good, "shared_bytes": (227 << 10) + 1}])
    assert found == [
        "k (c) on sm_90: spills 8 bytes a thread",
        f"k (c) on sm_90: {(227 << 10) + 1} bytes of shared memory; allowed: {227 << 10}",
    ]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (32, 4, 0, 64),
        (128, 4, 0, 16),
        (208, 4, 0, 8),
        (33, 4, 0, 48),
        (32, 1, 0, 32),
        (32, 4, 60 << 10, 12),
        (32, 4, 228 << 10, 0),
    ],
)
def test_resident_warps(resources: ModuleType, registers: int, warps: int, shared: int, expected: int) -> None:
    """Limited by warps, registers (handed out by 8 a thread), blocks, and shared memory."""
    assert resources.resident_warps(registers, warps, shared, resources.ARCHITECTURES[90]) == expected


def test_instructions_are_counted_by_kind(resources: ModuleType) -> None:
    code = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
    """
    assert resources.read_machine_code(code) == {
        "instructions": 7,
        "barriers": 1,
        "shuffles": 1,
        "matrix_instructions": 2,
        "atomics": 0,
        "loads_by_bytes_of_a_thread": {"4": 1, "16": 1},
    }
