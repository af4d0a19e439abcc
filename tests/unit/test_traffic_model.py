"""The traffic model: what it counts of a tiny tower's step, and that every figure is told as a projection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from frozen_fast.models import VIDEO_SIZES
from frozen_fast.models.video.space_time_flops import space_time_flops

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SIZE = "pico_patch16_32"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import traffic_model

    return traffic_model


def total(counts: dict[tuple[str, str], object], kind: str, attribute: str = "bytes") -> float:
    return sum(getattr(count, attribute) for (key, _), count in counts.items() if key == kind)


def test_products_are_those_of_the_architecture(model: ModuleType) -> None:
    """The patch embedding has no gradient of its input, and the attention kernels compute some products again."""
    frames, batch, shape = 2, 3, VIDEO_SIZES[SIZE]
    counts = model.count_step(model.BUILT, frames, batch, SIZE)
    counted = total(counts, "products", "flops") + total(counts, "attention", "flops")
    embedding = 2.0 * frames * shape.patches_per_frame * 3 * shape.patch**2 * shape.width
    executed = 3 * space_time_flops(shape, frames, executed=True) - embedding
    assert counted == pytest.approx(batch * executed, rel=0.05)


def test_a_norms_bytes_are_its_tensors(model: ModuleType) -> None:
    shape = VIDEO_SIZES[SIZE]
    counts = model.count_step(model.BUILT, 2, 3, SIZE)
    forward = counts["norms", "add_layer_norm"]
    tokens = 3 * (1 + 2 * shape.patches_per_frame) * shape.width
    with_branch = tokens * (4 + 2 + 4 + 2)  # stream and branch read, sum and norm written
    assert forward.bytes / forward.operators == pytest.approx(with_branch, rel=0.3)
    narrow = model.count_step(replace(model.BUILT, residual_dtype="bf16"), 2, 3, SIZE)
    assert total(narrow, "norms") < 0.75 * total(counts, "norms")


def test_each_change_moves_what_it_says(model: ModuleType) -> None:
    built = model.count_step(model.BUILT, 2, 3, SIZE)
    plain = model.count_step(replace(model.BUILT, fused=False), 2, 3, SIZE)
    assert 0 < total(built, "bias gradients") < 0.5 * total(plain, "bias gradients")
    assert ("norms", "native_layer_norm") in plain and ("gelu", "gelu") in plain
    through_sdpa = model.count_step(replace(model.BUILT, attention="sdpa"), 2, 3, SIZE)
    assert total(through_sdpa, "copies") > 2 * total(built, "copies")
    whole = model.count_step(replace(model.BUILT, full_last_block=True), 2, 3, SIZE)
    assert total(whole, "products", "flops") > total(built, "products", "flops")


def test_repeated_elements_are_counted_once(model: ModuleType) -> None:
    assert model.distinct_bytes(torch.zeros(1, 4).expand(100, 4)) == 16
    assert model.distinct_bytes(torch.zeros(3, 4, dtype=torch.bfloat16)) == 24


def test_every_figure_is_a_projection(model: ModuleType) -> None:
    row = model.row_of(model.BUILT, 1, 2, SIZE)
    for one in row["projection"]:
        assert {name for name in one if "mfu" in name} == {"projected_mfu_datasheet", "projected_mfu_measured_peak"}
        assert one["projected_mfu_measured_peak"] > one["projected_mfu_datasheet"] > 0
        assert one["projected_milliseconds"] == pytest.approx(sum(one["milliseconds"].values()))
        assert "datasheet" in one["peak"]
    text = model.table([row])
    assert text.startswith(model.NOTE) and "not measured" not in text.removeprefix(model.NOTE)
