"""The kernels compiled, on a GPU: every backend, every gradient, the sizes that a grid must survive."""

from __future__ import annotations

import pytest
import torch

from frozen_kernels import add_positions, chosen_backends, divided_attention, unavailable_backends
from frozen_kernels.attention import selection
from frozen_kernels.fused.positions import add_positions_reference
from support.attention_cases import assert_close, errors, make_case, run
from support.fused_cases import FUSED_CASES, fused_errors

pytestmark = pytest.mark.gpu

AXES = ("time", "space")
BACKENDS = ("reference", "sdpa", "xformers", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [
    # batch, frames, patches, heads, head width
    (2, 1, 1, 1, 16),
    (3, 1, 7, 3, 24),
    (2, 1, 196, 12, 64),
    (2, 2, 196, 3, 40),
    (2, 3, 7, 5, 17),
    (2, 4, 196, 12, 64),
    (1, 8, 196, 3, 128),
    (2, 16, 7, 3, 33),
    (1, 16, 196, 2, 64),
]


@pytest.fixture(autouse=True)
def plain_fp32_products():
    """The plain forms that kernels are compared with compute without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def need(backend, dtype):
    """Skip where a package is missing on this machine: the reason is in the report."""
    reason = unavailable_backends("cuda", dtype).get(backend)
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, axis, size, dtype):
    need(backend, dtype)
    qkv, grad = (value.cuda() for value in make_case(*size))
    found = errors(lambda x: divided_attention(x, size[1], axis, backend=backend), qkv.to(dtype), grad, size[1], axis)
    assert_close(found, dtype)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend, frames, axis):
    need(backend, torch.float32)
    wide, grad = (value.cuda() for value in make_case(2, frames, 9, 3, 32))
    qkv = wide.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)[..., ::2]
    grad = grad.unflatten(2, (3, 32))[..., ::2].flatten(2)
    found = errors(lambda x: divided_attention(x, frames, axis, backend=backend), qkv, grad, frames, axis)
    assert_close(found, torch.float32)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", ["sdpa", "xformers", "triton"])
def test_more_groups_than_a_grid_axis_holds(backend, axis, frames):
    """B*P beyond 65,535: the last clip of a large batch equals that clip alone."""
    need(backend, torch.bfloat16)
    batch, patches = 65_600 // 49 + 1, 49
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (batch, 1 + frames * patches, 3, 1, 16)
    qkv = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    grad = torch.ones(batch, shape[1], 16, device="cuda", dtype=torch.bfloat16)
    whole = run(lambda x: divided_attention(x, frames, axis, backend=backend), qkv, grad)
    alone = run(lambda x: divided_attention(x, frames, axis, backend=backend), qkv[-1:], grad[-1:])
    for name, value in alone.items():
        torch.testing.assert_close(whole[name][-1:], value, rtol=0.02, atol=0.02)


def test_offsets_beyond_32_bits():
    """A qkv of more than 2**31 elements: the last clip equals that clip alone."""
    need("triton", torch.float16)
    batch = 2**31 // (393 * 3 * 768) + 2
    if torch.cuda.mem_get_info()[0] < 5 * batch * 393 * 3 * 768 * 2:
        pytest.skip("not enough GPU memory")
    qkv = torch.empty(batch, 393, 3, 12, 64, device="cuda", dtype=torch.float16).normal_()
    for axis in AXES:
        leaf = qkv.detach().requires_grad_()
        out = divided_attention(leaf, 2, axis, backend="triton")
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        last = qkv[-1:].detach().clone().requires_grad_()
        alone = divided_attention(last, 2, axis, backend="triton")
        alone.backward(torch.ones_like(alone))
        assert torch.equal(out[-1:], alone) and torch.equal(gradient[-1:], last.grad)
        del out, gradient


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("frames", [1, 4])
def test_triton_repeats_bit_for_bit(axis, frames):
    need("triton", torch.bfloat16)
    qkv, grad = (value.cuda().bfloat16() for value in make_case(4, frames, 196, 4, 64))
    first, second = (run(lambda x: divided_attention(x, frames, axis, deterministic=True), qkv, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_compiled_by_inductor(backend):
    need(backend, torch.bfloat16)
    qkv, grad = (value.cuda() for value in make_case(2, 4, 49, 2, 64))

    def compute(x):
        return divided_attention(x * 1.0, 4, "time", backend=backend)

    plain, compiled = run(compute, qkv, grad), run(torch.compile(compute), qkv, grad)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-4)


def test_auto_measures_and_keeps(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path))
    selection.forget_choices()
    qkv, _ = make_case(2, 4, 49, 2, 64)
    out = divided_attention(qkv.cuda().bfloat16(), 4, "time")
    (row,) = chosen_backends()
    selection.forget_choices()
    assert row["how"] == "measured" and row["backend"] in row["milliseconds"] and out.isfinite().all()
    assert (tmp_path / selection.CACHE_FILE).exists()


def test_xformers_names_its_operators():
    need("xformers", torch.bfloat16)
    from frozen_kernels.attention.xformers import OPERATORS_USED

    qkv, _ = make_case(2, 4, 49, 2, 64)
    for axis in AXES:
        divided_attention(qkv.cuda().bfloat16(), 4, axis, backend="xformers")
    assert set(OPERATORS_USED) >= {"time", "space", "cls"} and all(OPERATORS_USED.values())


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_fused_ops(case):
    op, dtype, rows, width = case
    need("triton", getattr(torch, dtype))
    assert_close(fused_errors(op, dtype, rows, width, device="cuda"), getattr(torch, dtype))


def test_fused_ops_of_many_rows():
    need("triton", torch.bfloat16)
    assert_close(fused_errors("add_layer_norm", "bfloat16", 20_000, 768, device="cuda"), torch.bfloat16)
    assert_close(fused_errors("bias_gelu", "bfloat16", 5_000, 3072, device="cuda"), torch.bfloat16)


def test_positions():
    shapes = ((2, 3, 49, 64), (1, 1, 64), (1, 50, 64), (1, 4, 64))
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    torch.testing.assert_close(add_positions(*inputs), add_positions_reference(*inputs))
