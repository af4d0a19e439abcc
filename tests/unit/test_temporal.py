import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.models import expand_temporal_embedding
from support.released import released_temporal_embedding


@pytest.mark.parametrize("method", ["zero", "nearest", "bilinear"])
@pytest.mark.parametrize(("learned", "wanted"), [(1, 4), (4, 8), (1, 8), (3, 7), (4, 6), (8, 4), (4, 1), (5, 5)])
def test_expansion_equals_the_released_loading(method: str, learned: int, wanted: int) -> None:
    embed = torch.randn(1, learned, 16)
    got = expand_temporal_embedding(embed, wanted, method)
    assert got.shape == (1, wanted, 16)
    torch.testing.assert_close(got, released_temporal_embedding(embed, wanted, method), rtol=0, atol=1e-6)


def test_known_values() -> None:
    embed = torch.tensor([[[0.0], [1.0]]])
    assert expand_temporal_embedding(embed, 4, "zero").flatten().tolist() == [0, 1, 0, 0]
    assert expand_temporal_embedding(embed, 4, "nearest").flatten().tolist() == [0, 0, 1, 1]
    assert expand_temporal_embedding(embed, 4, "bilinear").flatten().tolist() == [0, 0.25, 0.75, 1]


def test_the_result_is_a_copy() -> None:
    embed = torch.zeros(1, 4, 2)
    expand_temporal_embedding(embed, 4).fill_(1)
    expand_temporal_embedding(embed, 2).fill_(1)
    assert embed.abs().max() == 0


@pytest.mark.parametrize(
    ("frames", "method", "message"),
    [(4, "bilinaer", "expansion: got 'bilinaer' .did you mean 'bilinear'"), (0, "zero", "num_frames: got 0")],
)
def test_mistakes_are_named(frames: int, method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand_temporal_embedding(torch.zeros(1, 2, 2), frames, method)
