"""Parameter groups, the learning rate's course, and AdamW against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from frozen_fast.config.schema import OptimizerConfig, OptimizerGroupConfig
from frozen_fast.errors import UserError
from frozen_fast.optimizers import (
    build_optimizer,
    freeze_groups,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)


class Towers(nn.Module):
    """A model with the released parameter names that the groups go by."""

    def __init__(self) -> None:
        super().__init__()
        self.video_model = nn.Module()
        self.video_model.temporal_embed = nn.Parameter(torch.ones(1, 4, 3))
        self.video_model.pos_embed = nn.Parameter(torch.ones(1, 5, 3))
        self.video_model.cls_token = nn.Parameter(torch.ones(1, 1, 3))
        self.video_model.norm = nn.LayerNorm(3)
        self.video_model.fc = nn.Linear(3, 3)
        self.text_model = nn.Module()
        self.text_model.position_embeddings = nn.Embedding(4, 3)
        self.text_model.fc = nn.Linear(3, 3)


def test_groups_hold_every_parameter_once_and_exempt_biases_norms_and_positions_from_decay() -> None:
    model = Towers()
    config = OptimizerConfig(weight_decay=0.1, text_learning_rate_scale=0.5, position_learning_rate_scale=7.0)
    groups = parameter_groups(model.named_parameters(), config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert found == {
        "video_model.temporal_embed": (0.0, 7.0),
        "video_model.pos_embed": (0.0, 7.0),
        "video_model.cls_token": (0.0, 7.0),
        "video_model.norm.weight": (0.0, 1.0),
        "video_model.norm.bias": (0.0, 1.0),
        "video_model.fc.weight": (0.1, 1.0),
        "video_model.fc.bias": (0.0, 1.0),
        "text_model.position_embeddings.weight": (0.0, 0.5),
        "text_model.fc.weight": (0.1, 0.5),
        "text_model.fc.bias": (0.0, 0.5),
    }


def test_groups_by_pattern_the_later_one_wins() -> None:
    model = Towers()
    groups = (
        OptimizerGroupConfig(match="video_model.*", learning_rate_scale=0.1, weight_decay=0.0),
        OptimizerGroupConfig(match="*.fc.weight", weight_decay=0.3),
        OptimizerGroupConfig(match="text_model.*", frozen=True),
        OptimizerGroupConfig(match="text_model.fc.*", frozen=False, learning_rate_scale=2.0),
    )
    config = OptimizerConfig(weight_decay=0.1, groups=groups)
    freeze_groups(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = parameter_groups(model.named_parameters(), config)
    found = {names[id(p)]: (group["weight_decay"], group["scale"]) for group in made for p in group["params"]}
    assert found == {
        "video_model.temporal_embed": (0.0, 0.1),
        "video_model.pos_embed": (0.0, 0.1),
        "video_model.cls_token": (0.0, 0.1),
        "video_model.norm.weight": (0.0, 0.1),
        "video_model.norm.bias": (0.0, 0.1),
        "video_model.fc.weight": (0.3, 0.1),
        "video_model.fc.bias": (0.0, 0.1),
        "text_model.fc.weight": (0.3, 2.0),
        "text_model.fc.bias": (0.0, 2.0),
    }
    assert not model.text_model.position_embeddings.weight.requires_grad


def test_wrong_groups_are_refused() -> None:
    typo = OptimizerConfig(groups=(OptimizerGroupConfig(match="vidio_model.*", frozen=True),))
    with pytest.raises(UserError, match=r"optimizer.groups: got match 'vidio_model\.\*', which no parameter has"):
        freeze_groups(Towers(), typo)
    everything = OptimizerConfig(groups=(OptimizerGroupConfig(match="*", frozen=True),))
    with pytest.raises(UserError, match="every parameter frozen"):
        freeze_groups(Towers(), everything)


def test_older_keys_for_towers_warn_with_the_groups_that_say_the_same(caplog: pytest.LogCaptureFixture) -> None:
    freeze_groups(Towers(), OptimizerConfig(text_learning_rate_scale=0.5))
    assert "use optimizer.groups: [{match: text_model.*, learning_rate_scale: 0.5}]" in caplog.text


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "lion", "lamb"])
def test_every_optimizer_lowers_a_loss_and_keeps_the_state_it_names(name: str) -> None:
    from frozen_fast.optimizers import optimizer_kind

    config = OptimizerConfig(name=name, learning_rate=0.05)
    torch.manual_seed(0)
    model, target = nn.Linear(4, 3), torch.randn(3, 4)
    optimizer = build_optimizer(model, config)
    losses = []
    for _ in range(60):
        loss = (model.weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    state = optimizer.state[model.weight].items()
    shaped = {key for key, x in state if getattr(x, "shape", None) == model.weight.shape}
    assert shaped == set(optimizer_kind(config).state_keys)


@pytest.mark.parametrize("fused", ["auto", "off", "on"])
def test_adamw_follows_the_published_update(fused: str) -> None:
    config = OptimizerConfig(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=fused)
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    optimizer = build_optimizer(model, config)
    mean, square, expected = torch.zeros(1, 2), torch.zeros(1, 2), start
    for step in (1, 2, 3):
        gradient = torch.tensor([[1.0, -2.0]]) * step
        model.weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected - 0.1 * 0.2 * expected - 0.1 * update
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimizerConfig(warmup_steps=4)
    factors = [learning_rate_factor(step, 100, config) for step in (1, 2, 3, 4, 5, 100)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_passes_the_half_and_ends_just_above_zero() -> None:
    config = OptimizerConfig(warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(step, 12, config) for step in range(1, 13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2 + 5] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert all(earlier > later > 0 for earlier, later in zip(factors[2:], factors[3:], strict=False))


def test_a_run_of_nothing_but_warm_up_has_no_division_by_zero() -> None:
    config = OptimizerConfig(warmup_steps=3, schedule="cosine")
    assert [learning_rate_factor(step, 3, config) for step in (1, 2, 3)] == [pytest.approx(i / 3) for i in (1, 2, 3)]


def test_learning_rate_reaches_the_groups_with_their_scale() -> None:
    groups = [{"scale": 1.0, "lr": 9.0}, {"scale": 0.1, "lr": 9.0}]
    set_learning_rate(groups, 2e-3)
    assert [group["lr"] for group in groups] == [2e-3, pytest.approx(2e-4)]
