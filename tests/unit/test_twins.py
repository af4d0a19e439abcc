"""Pairs of twins in a source."""

from __future__ import annotations

import pytest

from frozen_fast.data import Clip, Source, twin_pairs
from frozen_fast.errors import UserError


def source_of(*twins: tuple[str, str | None]) -> Source:
    clips = [Clip(id=name, path=f"{name}.webm", captions=("x",), twin=twin) for name, twin in twins]
    return Source(name="shapes", format="manifest", clips=clips)


def test_pairs_hold_every_clip_once_wherever_it_stands() -> None:
    source = source_of(("a", "d"), ("b", "c"), ("c", "b"), ("d", "a"))
    assert twin_pairs(source).tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("twins", "named"),
    [
        ((("a", "b"), ("b", "a"), ("c", None)), "clip 'c' with twin None"),
        ((("a", "b"), ("b", "a"), ("c", "elsewhere")), "clip 'c' with twin 'elsewhere'"),
        ((("a", "b"), ("b", "a"), ("c", "a")), "clip 'c' with twin 'a'"),
        ((("a", "a"),), "clip 'a' with twin 'a'"),
    ],
)
def test_a_clip_without_a_twin_of_its_own_is_named(twins: tuple, named: str) -> None:
    with pytest.raises(UserError, match=rf"data.sources\[shapes\].twins_together: got {named}; allowed"):
        twin_pairs(source_of(*twins))
