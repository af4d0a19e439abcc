"""Properties of the training crop: inside the frame, right shares and ratios, pure in its generator."""

from __future__ import annotations

import numpy as np
import pytest

from frozen_fast.data.decode import TrainView
from frozen_fast.data.plan.views import draw_train_view

SCALE, RATIO = (0.5, 1.0), (0.75, 4 / 3)


def draw(seed: int, height: int, width: int, flip: float = 0.5) -> TrainView:
    return draw_train_view(np.random.default_rng(seed), height, width, scale=SCALE, ratio=RATIO, flip_probability=flip)


@pytest.mark.parametrize("size", [(240, 320), (357, 241), (96, 96), (1, 1), (3, 500), (1000, 2)])
def test_boxes_lie_inside_the_frame(size: tuple[int, int]) -> None:
    height, width = size
    for seed in range(200):
        view = draw(seed, height, width)
        assert 0 <= view.top and view.top + view.height <= height and view.height >= 1
        assert 0 <= view.left and view.left + view.width <= width and view.width >= 1


def test_shares_and_ratios_cover_what_is_allowed_and_no_more() -> None:
    views = [draw(seed, 480, 640) for seed in range(2000)]
    shares = np.array([view.height * view.width / (480 * 640) for view in views])
    ratios = np.array([view.width / view.height for view in views])
    assert 0.49 < shares.min() < 0.52 and 0.98 < shares.max() <= 1.0
    assert 0.74 < ratios.min() < 0.77 and 1.31 < ratios.max() < 1.345
    tops = np.array([view.top / max(1, 480 - view.height) for view in views if view.height < 470])
    assert tops.min() < 0.02 and tops.max() > 0.98 and abs(tops.mean() - 0.5) < 0.03


def test_the_same_seed_gives_the_same_view_and_seeds_differ() -> None:
    assert draw(3, 240, 320) == draw(3, 240, 320)
    assert len({draw(seed, 240, 320) for seed in range(50)}) > 45


def test_the_generator_advances_equally_whatever_the_size() -> None:
    states = []
    for height, width in ((240, 320), (3, 500)):
        rng = np.random.default_rng(0)
        draw_train_view(rng, height, width, scale=SCALE, ratio=RATIO, flip_probability=0.5)
        states.append(rng.random())
    assert states[0] == states[1]


def test_flips_follow_their_probability() -> None:
    assert not any(draw(seed, 96, 96, flip=0.0).flip for seed in range(100))
    assert all(draw(seed, 96, 96, flip=1.0).flip for seed in range(100))
    assert 0.4 < np.mean([draw(seed, 96, 96).flip for seed in range(500)]) < 0.6


def test_a_very_long_frame_gets_the_largest_allowed_centred_box() -> None:
    view = draw(0, 30, 900)
    assert (view.height, view.width, view.top, view.left) == (30, 40, 0, 430)
    view = draw(0, 900, 30)
    assert (view.height, view.width, view.top, view.left) == (40, 30, 430, 0)
