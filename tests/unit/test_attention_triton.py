"""The Triton kernels without a GPU: interpreted on the CPU for their values, compiled for sm_90 for their types."""

from __future__ import annotations

import pytest
import torch

from support.attention_cases import assert_close
from support.interpreted_triton import ATTENTION_CASES
from support.triton_process import compile_for_hopper, run_interpreted

pytest.importorskip("triton")

from frozen_kernels.attention import tiles, triton  # noqa: E402
from frozen_kernels.attention.qkv_layout import Layout  # noqa: E402


@pytest.fixture(scope="module")
def interpreted():
    """What support/interpreted_triton.py prints of attention, run once."""
    return run_interpreted("attention")


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.slow
def test_interpreted_forward_and_gradients(case, interpreted):
    assert interpreted["interpreted"], "the kernels were not interpreted"
    assert_close(interpreted["cases"]["-".join(map(str, case))], getattr(torch, case[1]), cut_off=True)


@pytest.mark.parametrize("axis", ["time", "space"])
def test_small_tiles_change_nothing(axis, interpreted):
    """Many programs per head: CLS's gradients are then sums over programs."""
    assert interpreted["order"][axis]["repeats"]
    assert interpreted["order"][axis]["apart"] < 1e-5


@pytest.mark.parametrize("width", [1, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("frames", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("patches", [1, 7, 196, 1024])
def test_tiles_are_what_the_hardware_wants(width, frames, patches):
    layout = Layout(1, frames, patches, 1, width)
    padded = tiles.padded_width(width)
    assert padded >= max(16, width) and padded & (padded - 1) == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert tiles.rule("time", layout, dtype).rows >= 1
        tile = tiles.rule("space", layout, dtype)
        assert min(tile.rows, tile.keys) >= 16


def test_limits_are_named():
    with pytest.raises(ValueError, match="num_frames: got 17 with backend 'triton'; allowed: 1 to 16"):
        triton.check_limits(Layout(1, 17, 1, 1, 64))
    with pytest.raises(ValueError, match="head width 129 with backend 'triton'; allowed: 1 to 128"):
        triton.check_limits(Layout(1, 1, 1, 1, 129))


@pytest.mark.parametrize(
    ("module", "kernel", "dtype", "constants"),
    [
        ("triton_time_one", "one_frame_forward_kernel", "bf16", {"ROWS": 32, "DP": 64}),
        ("triton_time_one", "one_frame_backward_kernel", "fp32", {"ROWS": 32, "DP": 64}),
        ("triton_time", "time_forward_kernel", "fp16", {"T": 3, "TP": 4, "ROWS": 8, "DP": 64}),
        ("triton_time", "time_backward_kernel", "bf16", {"T": 8, "TP": 8, "ROWS": 4, "DP": 64}),
        ("triton_space", "space_forward_kernel", "bf16", {"patches": 196, "ROWS": 64, "KEYS": 64, "DP": 64}),
        ("triton_space", "space_backward_query_kernel", "fp32", {"patches": 7, "ROWS": 16, "KEYS": 16, "DP": 16}),
        ("triton_space", "space_backward_key_kernel", "bf16", {"patches": 196, "ROWS": 64, "KEYS": 64, "DP": 64}),
        ("triton_cls", "cls_partial_kernel", "bf16", {"ROWS": 64, "DP": 64}),
        ("triton_cls", "cls_combine_kernel", "fp16", {"blocks": 13, "DP": 64, "CHUNK": 16}),
        ("triton_cls", "cls_finish_kernel", "bf16", {"query_blocks": 4, "key_blocks": 13, "DP": 64, "CHUNK": 16}),
    ],
)
def test_compiles_for_hopper(module, kernel, dtype, constants):
    """Types and shapes that the interpreter lets pass and hardware does not."""
    from importlib import import_module

    if triton.INTERPRETED:
        pytest.skip("the kernels are interpreted in this process (TRITON_INTERPRET=1)")
    function = getattr(import_module(f"frozen_kernels.attention.{module}"), kernel)
    compiled = compile_for_hopper(function, dtype, constants, warps=4)
    assert ".target sm_90" in compiled.asm["ptx"]
    if module == "triton_space" and dtype == "bf16":
        assert "wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"], "no matrix unit is used"
