"""Products on a processor without units for bf16 and fp16, which these tests pretend wherever they run."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from frozen_fast.config.video_sizes import VIDEO_SIZES
from frozen_fast.models.linear import Linear, replace_linear_layers
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_kernels import linear
from frozen_kernels.products import choice

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def without_units(monkeypatch):
    monkeypatch.setattr(
        choice, "multiplied_in", lambda dtype: torch.float32 if dtype in (*NARROW, torch.float32) else dtype
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(function, x, weight, bias, grad):
    """Output and gradients in float64."""
    out = function(x, weight, bias)
    inputs = [value for value in (x, weight, bias) if value is not None]
    return [value.detach().double() for value in (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (2, 1, 1, 24), (24,)])
def test_narrow_products_are_at_least_as_exact_as_pytorchs(without_units, dtype, with_bias, shape):
    x, weight, bias = draw(*shape).to(dtype).requires_grad_(), draw(40, 24, seed=1), draw(40, seed=2)
    grad = draw(*shape[:-1], 40, seed=3).to(dtype)
    narrow = [weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_() if with_bias else None]
    exact = [value.detach().double().requires_grad_() if value is not None else None for value in (x, *narrow)]
    truth = run(F.linear, *exact, grad)
    ours, own = run(linear, x, *narrow, grad), run(F.linear, x, *narrow, grad)
    for found, plain, true in zip(ours, own, truth, strict=True):
        assert found.shape == true.shape
        assert (found - true).norm() <= 1.05 * (plain - true).norm() + 1e-12


def test_under_autocast_the_output_is_narrow_and_the_gradients_are_the_parameters_own(without_units):
    x, weight, bias = draw(6, 24).requires_grad_(), draw(40, 24, seed=1).requires_grad_(), draw(40).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert [value.grad.dtype for value in (x, weight, bias)] == [torch.float32] * 3
    exact = x.detach().bfloat16().float() @ weight.detach().t() + bias.detach()
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_what_needs_no_gradient_gets_none_and_costs_no_product(without_units, monkeypatch):
    x, weight, bias = draw(6, 24).bfloat16(), draw(40, 24).requires_grad_(), draw(40).requires_grad_()
    out = linear(x, weight, bias)
    counted = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: counted.append(1) or plain(left, right))
    out.sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is not None
    assert len(counted) == 1
    frozen = linear(x.requires_grad_(), weight.detach(), None)
    frozen.sum().backward()
    assert x.grad is not None and len(counted) == 2


def test_other_dtypes_are_pytorchs_own_bits():
    x, weight, bias = draw(6, 24), draw(40, 24), draw(40)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("into", [True, False])
def test_batched_products(without_units, dtype, into):
    left, right = draw(3, 5, 24).to(dtype), draw(3, 24, 7, seed=1).to(dtype)
    out = torch.empty(3, 5, 7, dtype=dtype) if into else None
    exact = left.double() @ right.double()
    for multiply, factor in ((choice.product, 1.0), (partial(choice.scaled_product, scale=0.5), 0.5)):
        found = multiply(left, right, out=out)
        assert found.dtype == dtype and (out is None or found.data_ptr() == out.data_ptr())
        assert (found - factor * exact).abs().max() <= 2**-8 * exact.abs().max()


def test_a_processor_without_units_multiplies_in_fp32(monkeypatch):
    choice._ask.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choice.multiplied_in(torch.bfloat16) == torch.float32
    assert choice.multiplied_in(torch.float64) == torch.float64
    choice._ask.cache_clear()


def tower_gradients(tower, video):
    """Output and gradients of a step under bf16 autocast."""
    tower.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tower(video)
    out.float().square().sum().backward()
    return out.detach().float(), torch.cat([parameter.grad.flatten() for parameter in tower.parameters()])


@pytest.mark.parametrize("attention", ["native", "batched"])
def test_a_towers_bf16_step_keeps_bf16s_distance_from_fp32(without_units, attention):
    torch.manual_seed(0)
    tower = SpaceTimeTransformer(VIDEO_SIZES["nano_patch16_64"], 2, attention=attention, time_init="random")
    video = draw(2, 2, 3, 64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        out, gradients = tower_gradients(tower, video)
    exact = copy.deepcopy(tower)
    exact.zero_grad()
    true = exact(video)
    true.square().sum().backward()
    truth = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    assert (out - true).norm() <= 0.02 * true.norm()
    assert (gradients - truth).norm() <= 0.03 * truth.norm()
    hidden = [value for value in saved if value.shape[-1:] == (tower.size.width * 4,) and value.dim() == 3]
    assert hidden and all(value.dtype == torch.bfloat16 for value in hidden), "activations are kept narrow"


def test_it_compiles_without_a_break(without_units):
    layer, x = Linear(24, 40), draw(6, 24).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_layers_of_another_model_are_replaced_in_place():
    model = nn.Sequential(nn.Linear(4, 5), nn.ModuleDict({"inner": nn.Linear(5, 3, bias=False)})["inner"], nn.ReLU())
    before, names = list(model.parameters()), list(model.state_dict())
    x = draw(2, 4)
    expected = model(x)
    replace_linear_layers(model.eval())
    assert [type(layer) for layer in model] == [Linear, Linear, nn.ReLU]
    assert not any(layer.training for layer in model)
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)
