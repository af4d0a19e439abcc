"""Losses as sums over anchors: values written out, one process against chunks, learned scale and its ceiling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frozen_fast.config import config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.losses import (
    InfoNCE,
    MaxMarginLoss,
    RetrievalLoss,
    SigmoidLoss,
    batch_loss,
    build_loss,
    contrastive_loss,
    gathered_loss,
)
from frozen_fast.models.learned_scale import LearnedScale, with_ceiling

LOSSES = {
    "infonce": InfoNCE(0.2),
    "mean": InfoNCE(0.2, average_directions=True),
    "sigmoid": SigmoidLoss(8.0, -3.0),
    "max_margin": MaxMarginLoss(0.3),
}


def two_similarities(text: dict[str, Tensor], video: dict[str, Tensor]) -> Tensor:
    """A model with K = 2: a dot product, and a product of feature sums (three axes on one side)."""
    first = text["a"] @ video["a"].T
    second = text["b"].sum((1, 2))[:, None] * video["b"].sum(1)[None]
    return torch.stack([first, second])


def draw(pairs: int = 7) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    text = {"a": torch.randn(pairs, 4), "b": torch.randn(pairs, 2, 3)}
    video = {"a": torch.randn(pairs, 4), "b": torch.randn(pairs, 5)}
    sides = ({name: x.double().requires_grad_() for name, x in side.items()} for side in (text, video))
    return next(sides), next(sides)


def test_the_margin_loss_of_the_worked_example() -> None:
    sim = torch.tensor([[[0.5, 0.4], [0.3, 0.2]]])
    assert float(batch_loss(MaxMarginLoss(0.2), sim, {})) == pytest.approx(0.2)
    assert float(batch_loss(MaxMarginLoss(0.2), torch.ones(1, 1, 1), {})) == 0.0


def test_the_sigmoid_loss_pair_by_pair() -> None:
    torch.manual_seed(1)
    sim = torch.randn(5, 5).double()
    expected = 0.0
    for row in range(5):
        for column in range(5):
            sign = 1.0 if row == column else -1.0
            expected += math.log(1 + math.exp(-sign * (8.0 * float(sim[row, column]) - 3.0)))
    assert float(batch_loss(LOSSES["sigmoid"], sim[None], {})) == pytest.approx(expected / 5)


def test_infonce_is_the_contrastive_loss_and_the_mean_is_half_of_it() -> None:
    torch.manual_seed(2)
    video, text = (torch.nn.functional.normalize(torch.randn(6, 3).double(), dim=-1) for _ in range(2))
    expected = float(contrastive_loss(video, text, 0.2))
    assert float(batch_loss(LOSSES["infonce"], (text @ video.T)[None], {})) == pytest.approx(expected)
    assert float(batch_loss(LOSSES["mean"], (text @ video.T)[None], {})) == pytest.approx(expected / 2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("local", "chunk_rows"), [(True, 0), (False, 0), (True, 3), (False, 2), (True, 100)])
def test_chunks_give_the_value_and_gradients_of_the_whole(name: str, local: bool, chunk_rows: int) -> None:
    text, video = draw()
    sim_KQV = two_similarities(text, video)
    whole = batch_loss(LOSSES[name], sim_KQV, {})
    apart = [float(batch_loss(LOSSES[name], sim_QV[None], {})) for sim_QV in sim_KQV]
    assert float(whole) == pytest.approx(sum(apart) / 2) and apart[0] != apart[1]
    leaves = [*text.values(), *video.values()]
    expected = torch.autograd.grad(whole, leaves)
    loss, value = gathered_loss(two_similarities, LOSSES[name], text, video, local=local, chunk_rows=chunk_rows)
    assert float(value) == pytest.approx(float(whole)) and not value.requires_grad
    for got, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_learned_scale_replaces_the_temperature_and_learns() -> None:
    torch.manual_seed(3)
    sim = torch.randn(1, 6, 6)
    scale = LearnedScale(1 / 0.2, max_scale=100.0)
    loss = batch_loss(InfoNCE(0.7), sim, scale())
    assert float(loss) == pytest.approx(float(batch_loss(InfoNCE(0.2), sim, {})), rel=1e-6)
    loss.backward()
    assert float(scale.logit_scale.grad) != 0.0
    biased = LearnedScale(8.0, max_scale=100.0, bias=-3.0)
    value = batch_loss(SigmoidLoss(1.0, 0.0), sim, biased())
    assert float(value) == pytest.approx(float(batch_loss(LOSSES["sigmoid"], sim, {})), rel=1e-5)


def test_the_ceiling_holds_and_lets_the_scale_come_down_again() -> None:
    x = torch.tensor([5.0], requires_grad=True)
    assert float(with_ceiling(x, 4.0)) == 4.0
    (up,) = torch.autograd.grad(-with_ceiling(x, 4.0).sum(), x)
    (down,) = torch.autograd.grad(with_ceiling(x, 4.0).sum(), x)
    assert (float(up), float(down)) == (0.0, 1.0), "a step may lower x, not raise it"
    below = torch.tensor([3.0], requires_grad=True)
    (free,) = torch.autograd.grad(-with_ceiling(below, 4.0).sum(), below)
    assert float(free) == -1.0


KINDS = [("infonce", InfoNCE), ("sigmoid", SigmoidLoss), ("max_margin", MaxMarginLoss)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_config_chooses_the_loss(name: str, kind: type[RetrievalLoss]) -> None:
    config = config_from_mapping({"loss": {"name": name, "margin": 0.4, "temperature": 0.1}})
    loss = build_loss(config.loss)
    assert type(loss) is kind
    assert getattr(loss, "margin", 0.4) == 0.4 and getattr(loss, "temperature", 0.1) == 0.1


def test_unknown_losses_and_uneven_features_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss.name: got 'infonc' \(did you mean 'infonce'\?\)"):
        build_loss(config_from_mapping({"loss": {"name": "infonc"}}).loss)
    with pytest.raises(UserError, match="loss: got features of shapes .*the same number of rows"):
        gathered_loss(two_similarities, LOSSES["infonce"], {"a": torch.ones(2, 4)}, {"a": torch.ones(3, 4)})
