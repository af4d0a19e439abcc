"""The backends that run on a CPU against the masked softmax in float64; xformers with its operator emulated."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from frozen_kernels import divided_attention
from frozen_kernels.attention import xformers
from frozen_kernels.attention.qkv_layout import read_layout
from support.attention_cases import assert_close, attention_by_mask, errors, exact, make_case, run

AXES = ("time", "space")
CPU_BACKENDS = ("reference", "sdpa", "cpu_c")
SIZES = [
    # batch, frames, patches, heads, head width
    (2, 1, 1, 1, 16),
    (3, 1, 7, 3, 5),
    (1, 1, 196, 2, 16),
    (2, 2, 7, 3, 24),
    (2, 3, 7, 1, 17),
    (1, 4, 196, 2, 16),
    (2, 8, 7, 3, 7),
    (1, 16, 1, 2, 64),
    (2, 16, 7, 1, 8),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_forward_and_gradients(backend, axis, size, dtype):
    qkv, grad = make_case(*size)
    found = errors(lambda x: divided_attention(x, size[1], axis, backend=backend), qkv.to(dtype), grad, size[1], axis)
    assert_close(found, dtype)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_input(backend, frames, axis):
    """A qkv that is a slice of something larger, with its axes in another order in memory."""
    wide, grad = make_case(2, frames, 5, 3, 12)
    qkv = wide.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)[..., ::2]
    assert not qkv.is_contiguous() and qkv.stride(-1) == 2
    grad = grad.unflatten(2, (3, 12))[..., ::2].flatten(2)
    found = errors(lambda x: divided_attention(x, frames, axis, backend=backend), qkv, grad, frames, axis)
    assert_close(found, torch.float32)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_frames_agree_with_the_whole(frames, dtype, monkeypatch):
    """cpu_c works on as many frames of the space axis at a time as fit in cache: pieces with a rest change nothing."""
    from frozen_kernels.attention import cpu_c

    qkv, grad = make_case(5, frames, 6, 2, 8)
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    layout = read_layout(qkv, frames, "space")
    assert len(list(cpu_c._pieces(qkv, layout))) == 1
    whole = run(lambda x: divided_attention(x, frames, "space", backend="cpu_c"), qkv, grad)
    three_frames = 3 * 2 * 7 * (7 + 3 * 8) * dtype.itemsize
    monkeypatch.setattr(cpu_c, "PIECE_BYTES", three_frames)
    groups = [(piece.start, piece.stop) for _, piece in cpu_c._pieces(qkv, layout)]
    assert groups[0] == (0, 6) and groups[-1][1] == 5 * frames * 2 and (groups[-1][1] - groups[-1][0]) < 6
    pieces = run(lambda x: divided_attention(x, frames, "space", backend="cpu_c"), qkv, grad)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("frames", [1, 3])
def test_cls_only_is_the_first_row(backend, frames):
    qkv, grad = make_case(2, frames, 5, 3, 8)
    grad[:, 1:] = 0
    row = run(lambda x: divided_attention(x, frames, "time", backend=backend, cls_only=True), qkv, grad)
    whole = exact(qkv, grad, frames, "time")
    assert row["out"].shape == (2, 1, 24)
    torch.testing.assert_close(row["out"], whole["out"][:, :1], rtol=0, atol=1e-5)
    for name in ("query", "key", "value"):
        torch.testing.assert_close(row[name], whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("axis", AXES)
def test_large_scores_do_not_overflow(backend, axis):
    qkv, _ = make_case(1, 2, 5, 2, 8)
    qkv[:, :, :2] *= 60
    out = divided_attention(qkv, 2, axis, backend=backend)
    torch.testing.assert_close(out.double(), attention_by_mask(qkv, 2, axis), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("frames", [1, 2])
def test_one_frame_sigmoid_at_the_ends(frames, axis):
    """Scores that saturate the sigmoid give zero gradients, not NaN."""
    qkv, grad = make_case(1, frames, 3, 1, 4)
    qkv[:, :, :2] *= 1000
    found = run(lambda x: divided_attention(x, frames, axis, backend="cpu_c"), qkv, grad)
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", ["reference", "cpu_c"])
def test_a_nan_is_not_lost(backend, axis):
    """A query that is NaN makes its own row NaN and no other (PyTorch's attention for CPUs, sdpa, makes it zeros)."""
    qkv, _ = make_case(1, 2, 5, 1, 8)
    qkv[0, 3, 0, 0, 2] = torch.nan
    out = divided_attention(qkv, 2, axis, backend=backend)
    assert out[0, 3].isnan().all() and not out[0, [0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("frames", [1, 3])
def test_autocast_leaves_a_backends_own_precision_alone(frames, axis):
    qkv, grad = make_case(2, frames, 5, 2, 8)
    plain = run(lambda x: divided_attention(x, frames, axis, backend="cpu_c"), qkv, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(lambda x: divided_attention(x, frames, axis, backend="cpu_c"), qkv, grad)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


@pytest.mark.parametrize("frames", [1, 3])
def test_no_probabilities_are_kept_without_gradients(frames):
    from frozen_kernels.attention.cpu_c import space_forward

    qkv, _ = make_case(2, frames, 5, 2, 8)
    with_gradients = divided_attention(qkv.requires_grad_(), frames, "space", backend="cpu_c")
    out, kept, _ = space_forward(qkv.detach(), frames, False)
    assert torch.equal(out, with_gradients) and kept.numel() == 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("axis", AXES)
def test_safe_under_compile_and_checkpointing(backend, axis):
    qkv, grad = make_case(2, 3, 5, 2, 8)

    def compute(x):
        return divided_attention(x, 3, axis, backend=backend)

    plain = run(compute, qkv, grad)
    compiled = run(torch.compile(compute, backend="aot_eager", fullgraph=True), qkv, grad)
    recomputed = run(lambda x: checkpoint(compute, x, use_reentrant=False), qkv, grad)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(recomputed[name], value, rtol=0, atol=0)


def test_registered_operators_keep_torchs_rules():
    """Fake shapes and no hidden mutation, as torch's own checker sees them."""
    from frozen_kernels.attention.cpu_c import space_backward, space_forward, time_backward, time_forward

    checks = ("test_schema", "test_faketensor")
    for frames in (1, 2):
        qkv, grad = make_case(1, frames, 3, 2, 4)
        torch.library.opcheck(time_forward, (qkv, frames), test_utils=checks)
        torch.library.opcheck(space_forward, (qkv, frames, True), test_utils=checks)
        state = time_forward(qkv, frames)[1]
        torch.library.opcheck(time_backward, (grad, qkv, state, frames), test_utils=checks)
        saved = space_forward(qkv, frames, True)[1:]
        torch.library.opcheck(space_backward, (grad, qkv, *saved, frames), test_utils=checks)


@pytest.mark.parametrize("axis", AXES)
def test_a_second_derivative_is_refused(axis):
    qkv, grad = make_case(1, 2, 3, 2, 4)
    qkv.requires_grad_()
    out = divided_attention(qkv, 2, axis, backend="cpu_c")
    (first,) = torch.autograd.grad(out, qkv, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("shape", "frames", "axis", "message"),
    [
        ((2, 7, 3, 2, 4), 4, "time", r"num_frames: got 4 for 7 tokens"),
        ((2, 7, 3, 2, 4), 0, "time", r"num_frames: got 0"),
        ((2, 7, 2, 2, 4), 1, "time", r"qkv: got shape \(2, 7, 2, 2, 4\)"),
        ((2, 7, 3, 8), 1, "time", r"qkv: got shape"),
        ((2, 7, 3, 2, 4), 1, "depth", r"axis: got 'depth'; allowed: time, space"),
    ],
)
def test_wrong_shapes_are_named(shape, frames, axis, message):
    with pytest.raises(ValueError, match=message):
        divided_attention(torch.zeros(shape), frames, axis, backend="reference")


def test_wrong_dtype_is_named():
    with pytest.raises(ValueError, match="got dtype torch.float64; allowed: float32"):
        divided_attention(torch.zeros(1, 3, 3, 1, 4, dtype=torch.float64), 1, "time")


# xformers: its operators need CUDA, so its layouts are tested with the operator emulated --------------------------


def emulate_xformers(monkeypatch, calls):
    """Stand in for memory_efficient_attention: BMHK, additive bias; checks what the CUDA kernels ask for."""

    def attention(query, key, value, attn_bias=None, scale=None, op=None):
        assert query.shape[0] <= xformers.GRID_LIMIT and query.shape[-1] % 8 == 0
        calls.append((tuple(query.shape), tuple(key.shape)))
        if attn_bias is not None:
            assert attn_bias.stride(-2) % 8 == 0 and attn_bias.dtype == query.dtype
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=attn_bias, scale=scale)
        return out.transpose(1, 2)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    operator = types.SimpleNamespace(NAME="emulated")
    monkeypatch.setattr(xformers, "choose_operators", lambda *parts: (operator, operator))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_xformers_layouts(axis, size, monkeypatch):
    calls = []
    emulate_xformers(monkeypatch, calls)
    qkv, grad = make_case(*size)

    def compute(x):
        return xformers.attention_xformers(x, read_layout(x, size[1], axis), axis)

    assert_close(errors(compute, qkv, grad, size[1], axis), torch.float32)
    assert set(xformers.OPERATORS_USED.values()) == {"emulated + emulated"}
    if axis == "time":
        queries, keys = calls[0]
        assert keys[1] == queries[1] + 1, "a pack shares one CLS key"


def test_xformers_names_each_operators_reasons():
    """On a CPU no operator can run: the error names what each of them lacks."""
    pytest.importorskip("xformers")
    tensor = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="got 'xformers'; no operator supports these inputs .*device=cpu"):
        xformers.choose_operators(tensor, tensor, tensor, None)


def test_xformers_splits_what_passes_the_grid_limit(monkeypatch):
    calls = []
    emulate_xformers(monkeypatch, calls)
    monkeypatch.setattr(xformers, "GRID_LIMIT", 4)
    monkeypatch.setattr(xformers.batch_slices, "__defaults__", (4,))
    qkv, grad = make_case(3, 3, 5, 2, 8)

    def compute(x):
        return xformers.attention_xformers(x, read_layout(x, 3, "space"), "space")

    assert_close(errors(compute, qkv, grad, 3, "space"), torch.float32)
    assert [query[0] for query, _ in calls][:3] == [4, 4, 1]


@pytest.mark.parametrize(
    ("patches", "frames", "expected"),
    [(196, 1, 49), (196, 4, 14), (196, 8, 7), (196, 16, 2), (7, 1, 7), (197, 4, 1), (1, 16, 1)],
)
def test_packs_fill_a_tile(patches, frames, expected):
    size = xformers.pack_size(patches, frames)
    assert size == expected and patches % size == 0


def test_batches_beyond_the_grid_limit():
    """335 clips of 196 positions pass 65,535: slices cover them in order, none too large."""
    slices = list(xformers.batch_slices(335 * 196))
    assert [piece.start for piece in slices] == [0, 65_535]
    assert slices[-1].stop == 335 * 196 and all(piece.stop - piece.start <= 65_535 for piece in slices)


def test_sdpa_folds_groups_into_heads(monkeypatch):
    """B*P*N beyond 65,535 must not reach the batch axis: it stays B on the time axis and B*T on the space axis."""
    from frozen_kernels.attention import sdpa

    shapes = []

    def attention(query, key, value):
        shapes.append(tuple(query.shape))
        return torch.empty_like(query)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", attention)
    qkv = torch.empty(336, 1 + 2 * 196, 3, 1, 8, device="meta")
    for axis in AXES:
        assert divided_attention(qkv, 2, axis, backend="sdpa").shape == (336, 393, 8)
    assert (336, 196, 2, 8) in shapes and (672, 1, 196, 8) in shapes
    assert all(max(shape[:2]) <= 65_535 for shape in shapes)
