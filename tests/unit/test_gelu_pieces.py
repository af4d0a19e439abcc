import pytest
import torch
from torch.nn.functional import gelu

from frozen_kernels import gelu_pieces
from frozen_kernels.gelu_pieces import exact_gelu


def both(function: object, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 130, 96)])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_no_worse_than_torchs_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    monkeypatch.setattr(gelu_pieces, "PIECE_ELEMENTS", 1000)
    torch.manual_seed(0)
    x, grad = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    if transposed:
        x, grad = (tensor.transpose(0, -1) for tensor in (x, grad))
    exact = both(gelu, x.double(), grad.double())
    theirs, ours = both(gelu, x, grad), both(exact_gelu, x, grad)
    for reference, their, our in zip(exact, theirs, ours, strict=True):
        assert our.dtype == dtype and our.shape == x.shape
        assert (our.double() - reference).abs().max() <= 2 * (their.double() - reference).abs().max()


def test_float32_is_torchs_own() -> None:
    x, grad = torch.randn(5, 7), torch.randn(5, 7)
    for theirs, ours in zip(both(gelu, x, grad), both(exact_gelu, x, grad), strict=True):
        assert torch.equal(theirs, ours)


def test_second_derivatives_are_refused() -> None:
    x, scale = (torch.randn(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad((exact_gelu(x) * scale).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
