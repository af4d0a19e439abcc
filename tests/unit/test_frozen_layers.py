"""model.text.frozen_layers: what keeps its weights, what learns, and what that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.models import TransformersTower
from frozen_fast.models.text.text_shape import TextShape
from frozen_fast.profiling.flops import clip_flops
from support.towers import make_text_tower


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_layers_get_no_gradient_and_the_others_do(kind: str, count: int, tmp_path: Path) -> None:
    tower = TransformersTower.build(str(make_text_tower(tmp_path, kind, layers=3)), max_tokens=20, pooling="mean")
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    tower.freeze_layers(count)
    learning = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    batch = tower.tokenize(["a red circle moves from left to right", "a dog"])
    tower(batch["input_ids"], batch["attention_mask"]).square().sum().backward()
    optimizer.step()
    changed = {name for name, parameter in tower.named_parameters() if not torch.equal(parameter, before[name])}
    layer = "encoder.layer" if kind == "bert" else "transformer.layer"
    assert ("embeddings.word_embeddings.weight" in changed) == (count == 0)
    for index in range(3):
        moved = any(name.startswith(f"{layer}.{index}.") for name in changed)
        assert moved == (index >= count), index


@pytest.mark.parametrize("count", [-1, 3])
def test_more_layers_than_there_are_is_an_error(count: int, tmp_path: Path) -> None:
    tower = TransformersTower.build(str(make_text_tower(tmp_path, layers=2)), max_tokens=20)
    with pytest.raises(UserError, match=rf"model.text.frozen_layers: got {count}; allowed: 0 to 2"):
        tower.freeze_layers(count)


def test_frozen_layers_count_as_forward_only(tmp_path: Path) -> None:
    tower = TransformersTower.build(str(make_text_tower(tmp_path, layers=4)), max_tokens=20)
    forward = tower.forward_flops(7)
    assert tower.frozen_flops(7) == 0
    tower.freeze_layers(3)
    assert tower.forward_flops(7) == forward
    layer = TextShape.from_config(tower.config).layer_flops(7)
    assert tower.frozen_flops(7) == 3 * layer
    sizes = {"widths": (64, 32), "global_batch_size": 5}
    free, frozen = (clip_flops(1e6, forward, **sizes, frozen=share) for share in (0.0, 3 * layer))
    assert frozen.forward == free.forward
    assert free.training - frozen.training == pytest.approx(2 * 3 * layer)
    tower.requires_grad_(False)
    assert tower.frozen_flops(7) == forward
