import copy

import pytest
import torch
from torch import nn

from frozen_fast.errors import UserError
from frozen_fast.models import VIDEO_SIZES, SpaceTimeTransformer, VideoSize
from support.released import ReleasedModel

SIZE = VideoSize(resolution=48, patch=16, width=128, depth=3, heads=2)


def plain_and_ours(max_frames: int = 4, timesformer: bool = False, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = ReleasedModel(depth=3, side=3, max_frames=max_frames, timesformer=timesformer).video_model
    block = "timesformer" if timesformer else "frozen_in_time"
    ours = SpaceTimeTransformer(SIZE, max_frames, block=block, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(model: nn.Module, video: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(video)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(first: nn.Module, second: nn.Module, video: torch.Tensor, tolerance: float = 1e-5) -> None:
    out, grads = gradients(first, video)
    other_out, other_grads = gradients(second, video)
    torch.testing.assert_close(out, other_out, rtol=0, atol=tolerance)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(other_grads[name] / scale, grad / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("timesformer", [False, True])
@pytest.mark.parametrize("attention", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_forward_and_gradients_equal_the_plain_model(frames: int, attention: str, timesformer: bool) -> None:
    plain, ours = plain_and_ours(timesformer=timesformer, attention=attention)
    assert_same(plain, ours, torch.randn(2, frames, 3, 48, 48))


def test_eight_frames_in_double_precision_agree_to_rounding() -> None:
    plain, ours = plain_and_ours(max_frames=8)
    video = torch.randn(1, 8, 3, 48, 48)
    ours_out = ours(video)
    exact = plain.double()(video.double())
    torch.testing.assert_close(ours_out.double(), exact, rtol=0, atol=1e-5)


def test_the_two_block_forms_differ() -> None:
    _, frozen = plain_and_ours()
    _, timesformer = plain_and_ours(timesformer=True)
    timesformer.load_state_dict(frozen.state_dict())
    video = torch.randn(1, 2, 3, 48, 48)
    assert (frozen(video) - timesformer(video)).abs().max() > 1e-2


@pytest.mark.parametrize("timesformer", [False, True])
@pytest.mark.parametrize("frames", [1, 4])
def test_the_short_last_block_changes_neither_value_nor_gradient(frames: int, timesformer: bool) -> None:
    _, short = plain_and_ours(timesformer=timesformer)
    _, full = plain_and_ours(timesformer=timesformer, full_last_block=True)
    assert_same(full, short, torch.randn(2, frames, 3, 48, 48), tolerance=3e-6)


def test_checkpointed_blocks_change_neither_value_nor_gradient() -> None:
    _, stored = plain_and_ours()
    _, recomputed = plain_and_ours(checkpointed_blocks=3)
    assert_same(stored, recomputed, torch.randn(2, 2, 3, 48, 48), tolerance=0)


def test_the_residual_stream_is_bf16_under_autocast_where_it_is_asked_for() -> None:
    _, wide = plain_and_ours()
    _, narrow = plain_and_ours(residual_dtype="bf16")
    narrow.load_state_dict(wide.state_dict())
    video = torch.randn(2, 2, 3, narrow.resolution, narrow.resolution)
    streams: list[torch.dtype] = []
    for block in narrow.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: streams.append(outputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = wide(video), narrow(video)
    assert set(streams) == {torch.bfloat16} and found.dtype == expected.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in narrow.parameters())
    streams.clear()
    torch.testing.assert_close(narrow(video), wide(video))
    assert set(streams) == {torch.float32}


def test_checkpointed_blocks_hold_fewer_bytes_for_the_backward_pass() -> None:
    def saved_bytes(blocks: int) -> int:
        _, model = plain_and_ours(checkpointed_blocks=blocks)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(8, 4, 3, 48, 48))
        return sum(seen.values())

    assert saved_bytes(3) < 0.6 * saved_bytes(0)


def test_a_clip_uses_the_first_rows_of_a_larger_temporal_embedding() -> None:
    _, large = plain_and_ours(max_frames=8)
    small = SpaceTimeTransformer(SIZE, 2)
    state = large.state_dict()
    state["temporal_embed"] = state["temporal_embed"][:, :2]
    small.load_state_dict(state)
    video = torch.randn(2, 2, 3, 48, 48)
    torch.testing.assert_close(large(video), small(video), rtol=0, atol=0)


def test_skipped_time_attention_leaves_zero_gradients_in_the_graph() -> None:
    _, model = plain_and_ours(skip_time_attention_at_one_frame=True)
    with_branch = plain_and_ours()[1]
    one, two = torch.randn(2, 1, 3, 48, 48), torch.randn(2, 2, 3, 48, 48)
    _, grads = gradients(model, one)
    for name, grad in grads.items():
        branch = "timeattn" in name or "norm3" in name
        assert grad is not None, name
        assert (grad.abs().max() == 0) == branch, name
    without = copy.deepcopy(with_branch)
    with torch.no_grad():
        for block in without.blocks:
            block.timeattn.proj.weight.zero_()
            block.timeattn.proj.bias.zero_()
    torch.testing.assert_close(model(one), without(one), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(two), with_branch(two), rtol=0, atol=0)


def test_the_base_tower_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = SpaceTimeTransformer(VIDEO_SIZES["base_patch16_224"], 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 114_168_576


@pytest.mark.parametrize("time_init", ["zero_output", "released", "random"])
def test_time_attention_starts_without_an_output_and_the_default_learns(time_init: str) -> None:
    torch.manual_seed(0)
    model = SpaceTimeTransformer(SIZE, 4, time_init=time_init)
    out, bias = model.blocks[0].timeattn(torch.randn(2, 19, 128), 2)
    assert bias is None or not bias.any()
    assert (out.abs().max() == 0) == (time_init != "random")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        gradients(model, torch.randn(2, 2, 3, 48, 48))
        optimizer.step()
    queries_and_keys = model.blocks[0].timeattn.qkv.weight.grad[: 2 * 128]
    assert (queries_and_keys.abs().max() == 0) == (time_init == "released")


def test_initial_weights_follow_the_seed_and_have_the_stated_spread() -> None:
    torch.manual_seed(3)
    first = SpaceTimeTransformer(VIDEO_SIZES["nano_patch16_64"], 2).state_dict()
    torch.manual_seed(3)
    second = SpaceTimeTransformer(VIDEO_SIZES["nano_patch16_64"], 2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["blocks.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert first["temporal_embed"].abs().max() == 0


@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 48, 48), (2, 0, 3, 48, 48), (2, 1, 1, 48, 48), (2, 1, 3, 48, 32), (2, 3, 48, 48)]
)
def test_another_shape_is_refused_with_the_expected_one(shape: tuple[int, ...]) -> None:
    _, model = plain_and_ours()
    with pytest.raises(ValueError, match=r"video: got shape .*allowed: \[B, T, 3, 48, 48\] with 1 <= T <= 4"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames": 0}, "max_frames: got 0"),
        ({"checkpointed_blocks": 4}, "checkpointed_blocks: got 4; allowed: 0 to 3"),
        ({"block": "joint"}, "block: got 'joint'"),
        ({"time_init": "zeros"}, "time_init: got 'zeros'"),
        ({"attention": "spda"}, "model.video.attention: got 'spda' .did you mean 'sdpa'"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpaceTimeTransformer(SIZE, **{"max_frames": 4, **options})


def test_an_attention_backend_that_cannot_run_here_is_named_before_the_first_step() -> None:
    SpaceTimeTransformer(SIZE, 4, attention="sdpa").check_kernels("cpu")
    with pytest.raises(
        UserError, match=r"model.video.attention: got 'xformers': .*; allowed here: auto, reference, sdpa"
    ):
        SpaceTimeTransformer(SIZE, 4, attention="xformers").check_kernels("cpu")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"resolution": 50}, "resolution: got 50"), ({"heads": 3}, "width: got 128"), ({"depth": 0}, "depth: got 0")],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoSize(**{"resolution": 48, "patch": 16, "width": 128, "depth": 3, "heads": 2, **sizes})


@pytest.mark.parametrize("name", [name for name in VIDEO_SIZES if "224" not in name])
def test_every_small_size_runs(name: str) -> None:
    size = VIDEO_SIZES[name]
    out = SpaceTimeTransformer(size, 2)(torch.randn(1, 2, 3, size.resolution, size.resolution))
    assert out.shape == (1, size.width)
    assert out.isfinite().all()


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    plain, ours = plain_and_ours()
    video = torch.randn(2, 2, 3, 48, 48)
    exact = plain(video)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference_error = (plain(video).float() - exact).abs().max()
        ours_error = (ours(video).float() - exact).abs().max()
    assert ours_error <= 2 * reference_error
