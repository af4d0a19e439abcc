"""Fused ops: plain forms here, Triton forms interpreted, all against float64."""

from __future__ import annotations

import pytest
import torch

from frozen_kernels import add_layer_norm, add_positions, bias_gelu, gelu_reference
from frozen_kernels.fused import forms
from frozen_kernels.fused.forms import fused_form
from frozen_kernels.fused.positions import add_positions_reference
from support.attention_cases import assert_close
from support.fused_cases import FUSED_CASES, fused_errors
from support.triton_process import compile_for_hopper, run_interpreted


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_plain_forms(case):
    op, dtype, rows, width = case
    assert_close(fused_errors(op, dtype, rows, width, backend="plain"), getattr(torch, dtype))


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_cpu_c_forms(case):
    op, dtype, rows, width = case
    assert_close(fused_errors(op, dtype, rows, width, backend="cpu_c"), getattr(torch, dtype))


@pytest.mark.parametrize("approximate", ["none", "sigmoid", "tanh"])
def test_cpu_c_gelu_far_from_zero(approximate):
    """The tails, where an approximation of erf would show, and what is not finite."""
    x, wide = (torch.linspace(-30, 30, 4001, dtype=kind).requires_grad_() for kind in (torch.float32, torch.float64))
    out = bias_gelu(x, torch.zeros(4001), approximate=approximate, backend="cpu_c")
    exact = gelu_reference(wide, approximate)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=2e-6)
    odd = bias_gelu(torch.tensor([torch.nan, torch.inf]), torch.zeros(2), approximate=approximate, backend="cpu_c")
    assert odd[0].isnan() and odd[1] == torch.inf


@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_of_layer_norms_results_may_go_nowhere(used):
    x, branch, weight, bias = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    grads = {}
    for backend in ("plain", "cpu_c"):
        leaves = [value.clone().requires_grad_() for value in (x, branch.bfloat16(), weight, bias)]
        outputs = add_layer_norm(*leaves, backend=backend)
        outputs[used == "norm"].square().sum().backward()
        grads[backend] = [torch.zeros(8) if leaf.grad is None else leaf.grad for leaf in leaves]
        assert [grad.dtype for grad in grads[backend][:2]] == [torch.float32, torch.bfloat16]
    for compiled, plain in zip(grads["cpu_c"], grads["plain"], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    return run_interpreted("fused")


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
@pytest.mark.slow
def test_interpreted_triton_forms(case, interpreted):
    assert interpreted["interpreted"]
    assert_close(interpreted["-".join(map(str, case))], getattr(torch, case[1]), cut_off=True)


FORWARD = ("HAS_BRANCH", "HAS_BIAS", "KEEP_SUM")
BACKWARD = ("HAS_STREAM", "HAS_BRANCH", "HAS_BIAS", "BRANCH_APART", "SUM_BRANCH", "THROUGH")


@pytest.mark.parametrize(
    ("module", "kernel", "dtype", "constants"),
    [
        ("triton_layer_norm", "forward_kernel", "bf16", {**dict.fromkeys(FORWARD, True), "ROWS": 4, "DP": 1024}),
        ("triton_layer_norm", "forward_kernel", "fp16", {**dict.fromkeys(FORWARD, False), "ROWS": 4, "DP": 1024}),
        ("triton_layer_norm", "backward_kernel", "bf16", {**dict.fromkeys(BACKWARD, True), "ROWS": 64, "DP": 1024}),
        ("triton_layer_norm", "backward_kernel", "fp16", {**dict.fromkeys(BACKWARD, False), "ROWS": 64, "DP": 1024}),
        ("triton_bias_gelu", "forward_kernel", "bf16", {"APPROXIMATE": 0, "ROWS": 8, "COLUMNS": 256}),
        ("triton_bias_gelu", "backward_kernel", "bf16", {"APPROXIMATE": 0, "ROWS": 64, "COLUMNS": 256}),
        ("triton_bias_gelu", "backward_kernel", "bf16", {"APPROXIMATE": 1, "ROWS": 64, "COLUMNS": 256}),
    ],
)
def test_compiles_for_hopper(module, kernel, dtype, constants):
    pytest.importorskip("triton")
    from importlib import import_module

    compiled = compile_for_hopper(getattr(import_module(f"frozen_kernels.fused.{module}"), kernel), dtype, constants, 4)
    assert ".target sm_90" in compiled.asm["ptx"]


def positions_case(dtype=torch.float32, learned=4):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (1, 1, 8), (1, 6, 8), (1, learned, 8))
    patches, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [value.requires_grad_() for value in (patches.to(dtype), *rest)]


@pytest.mark.parametrize("learned", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_equal_the_plain_form(dtype, learned):
    ours, plain = positions_case(dtype, learned), positions_case(dtype, learned)
    out, expected = add_positions(*ours), add_positions_reference(*plain)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)


def test_positions_under_compile():
    inputs = positions_case()
    compiled = torch.compile(add_positions, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, add_positions(*inputs))


def test_mistakes_are_named():
    x, weight = torch.zeros(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"branch: got shape \(2, 3, 4\); allowed: that of x"):
        add_layer_norm(x, torch.zeros(2, 3, 4), weight, weight)
    with pytest.raises(ValueError, match=r"weight, bias: got \(4,\), \(8,\); allowed: \[8\]"):
        add_layer_norm(x, None, torch.ones(4), weight)
    with pytest.raises(ValueError, match=r"branch_bias: got \(8,\) without a branch; allowed: \[8\] with a branch"):
        add_layer_norm(x, None, weight, weight, branch_bias_D=weight)
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\); allowed: \[8\]"):
        bias_gelu(x, torch.zeros(4))
    with pytest.raises(ValueError, match="approximate: got 'erf'; allowed: none, sigmoid, tanh"):
        bias_gelu(x, weight, approximate="erf")
    patches, cls_token, pos, temporal = positions_case()
    with pytest.raises(ValueError, match="positions: got cls"):
        add_positions(patches, cls_token, pos[:, 1:], temporal)
    with pytest.raises(ValueError, match=r"got temporal \(1, 2, 8\); allowed: \(1, at least 3, 8\)"):
        add_positions(patches, cls_token, pos, temporal[:, :2])
    with pytest.raises(ValueError, match="different dtypes"):
        add_positions(patches, cls_token, pos, temporal.to(torch.bfloat16))


def test_which_form_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert fused_form("auto", cpu, torch.float32) == fused_form("cpu_c", cpu, torch.float32) == "cpu_c"
    assert fused_form("plain", cpu, torch.float32) == "plain"
    with pytest.raises(ValueError, match="got 'triton', which cannot run here: .*; allowed: auto, plain, cpu_c"):
        fused_form("triton", cpu, torch.float32)
    with pytest.raises(ValueError, match="backend: got 'fast'; allowed: auto, plain, triton, cpu_c"):
        fused_form("fast", cpu, torch.float32)
    monkeypatch.setattr(forms, "why_not", lambda *_: "no C compiler")
    assert fused_form("auto", cpu, torch.float32) == "plain"
