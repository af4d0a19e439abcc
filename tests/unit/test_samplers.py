from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from frozen_fast.config import config_from_mapping, steps_per_epoch
from frozen_fast.data.plan.samplers import (
    BatchSpec,
    DataPosition,
    SourceStream,
    epoch_order,
    plan_steps,
    source_order,
)
from frozen_fast.data.plan.seeds import keyed_rng
from frozen_fast.errors import UserError

SIZES = {"video": 50, "image": 130}
WEIGHTS = {"video": 1.0, "image": 1.0}
BATCHES = {"video": 12, "image": 24}


def plan(**changes: Any) -> list[BatchSpec]:
    settings: dict[str, Any] = {
        "source_sizes": SIZES,
        "weights": WEIGHTS,
        "order": "round_robin",
        "seed": 7,
        "batch_sizes": BATCHES,
        "frames": 4,
        "num_steps": 20,
        "start": DataPosition(),
    }
    settings.update(changes)
    sizes, weights, order, seed = (settings.pop(name) for name in ("source_sizes", "weights", "order", "seed"))
    return list(plan_steps(sizes, weights, order, seed, **settings))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("order", ["round_robin", "weighted"])
def test_ranks_partition_every_batch_exactly(world_size: int, order: str) -> None:
    whole = plan(order=order, accumulation=2)
    ranks = [plan(order=order, accumulation=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, spec in enumerate(whole):
        parts = [specs[number] for specs in ranks]
        assert sum((part.clip_indices for part in parts), ()) == spec.clip_indices
        assert sum((part.positions for part in parts), ()) == spec.positions == tuple(spec.batch_positions)
        assert all(part.batch_positions == spec.batch_positions for part in parts)
        assert len({len(part.positions) for part in parts}) == 1
        assert all(part.after == spec.after and part.source == spec.source for part in parts)


@pytest.mark.parametrize("stop", [1, 7, 13])
@pytest.mark.parametrize("order", ["round_robin", "weighted"])
def test_resume_gives_the_same_specs(stop: int, order: str) -> None:
    whole = plan(order=order, accumulation=3)
    saved = next(spec for spec in whole if spec.step == stop and spec.last_pass_of_step).after
    position = DataPosition.from_json(json.loads(json.dumps(saved.to_json())))
    assert position == saved and position.step == stop
    rest = plan(order=order, accumulation=3, start=position, num_steps=20 - stop)
    assert rest == [spec for spec in whole if spec.step > stop]


def test_one_source_per_step_and_the_last_pass_is_marked() -> None:
    specs = plan(accumulation=3)
    assert [spec.step for spec in specs] == [step for step in range(1, 21) for _ in range(3)]
    assert [spec.pass_index for spec in specs] == [0, 1, 2] * 20
    assert [spec.last_pass_of_step for spec in specs] == [False, False, True] * 20
    for step in range(1, 21):
        assert len({spec.source for spec in specs if spec.step == step}) == 1
    assert all(spec.after.step == spec.step - (not spec.last_pass_of_step) for spec in specs)


def test_an_epoch_of_the_stream_holds_every_clip_once() -> None:
    for size in (1, 2, 3, 5, 50, 97):
        for epoch in range(4):
            assert sorted(epoch_order("s", size, 1, epoch).tolist()) == list(range(size))
    orders = [tuple(epoch_order("s", 50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert tuple(epoch_order("other", 50, 0, 0)) != orders[0]


@pytest.mark.parametrize("size", [3, 7, 10, 30, 50, 64])
def test_a_batch_never_repeats_a_clip_where_there_are_enough(size: int) -> None:
    for batch in range(1, size + 1):
        stream = SourceStream("s", size, 5)
        position, seen = 0, 0
        for _ in range(4 * size // batch + 4):
            position = stream.batch_start(position, batch)
            clips = stream.clips(position, batch)
            assert len(set(clips)) == batch, (size, batch)
            position += batch
            seen += batch
        if batch <= size // 3 + 1:
            assert position == seen, "nothing is passed over while batches are small"


def test_nearby_batches_of_small_size_differ_across_the_epoch() -> None:
    stream = SourceStream("s", 30, 2)
    for epoch in range(1, 20):
        window = stream.clips(30 * epoch - 10, 20)
        assert len(set(window)) == 20


def test_a_source_smaller_than_a_batch_repeats_as_evenly_as_it_can(caplog: pytest.LogCaptureFixture) -> None:
    specs = plan(source_sizes={"tiny": 5}, weights={"tiny": 1}, batch_sizes={"tiny": 12}, num_steps=5)
    for spec in specs:
        counts = Counter(spec.clip_indices)
        assert len(counts) == 5 and max(counts.values()) <= 4
    assert "more than once" in caplog.text
    total = Counter(clip for spec in specs for clip in spec.clip_indices)
    assert set(total.values()) == {12}


@pytest.mark.parametrize("clips", [2, 6, 10, 50, 64])
def test_pairs_stay_together_and_a_batch_never_repeats_a_clip(clips: int) -> None:
    rng = np.random.default_rng(clips)
    pairs = rng.permutation(clips).reshape(-1, 2)
    partner = {int(a): int(b) for a, b in [*pairs, *pairs[:, ::-1]]}
    for batch in range(2, clips + 1, 2):
        stream = SourceStream("s", clips, 5, pairs)
        position, seen = 0, Counter[int]()
        for _ in range(4 * clips // batch + 4):
            position = stream.batch_start(position, batch)
            taken = stream.clips(position, batch)
            assert len(set(taken)) == batch and {partner[clip] for clip in taken} == set(taken)
            position += batch
            seen.update(taken)
        assert set(seen) == set(range(clips))
    streams = [SourceStream("s", clips, seed, pairs) for seed in range(3)]
    orders = {stream.clips(clips * epoch, clips) for stream in streams for epoch in range(3)}
    assert len(orders) == 9 or clips < 10


def test_pairs_pass_through_the_plan_of_every_rank() -> None:
    pairs = np.arange(50).reshape(-1, 2)[:, ::-1]
    whole = [spec for spec in plan(pairs={"video": pairs}) if spec.source == "video"]
    assert all({clip ^ 1 for clip in spec.clip_indices} == set(spec.clip_indices) for spec in whole)
    images = [spec.clip_indices for spec in plan(pairs={"video": pairs}) if spec.source == "image"]
    assert images == [spec.clip_indices for spec in plan() if spec.source == "image"]
    halves = [plan(pairs={"video": pairs}, rank=rank, world_size=2) for rank in range(2)]
    parts = [a.clip_indices + b.clip_indices for a, b in zip(*halves, strict=True) if a.source == "video"]
    assert parts == [spec.clip_indices for spec in whole]


def test_a_rank_builds_its_own_part_of_a_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank holds and hands to its loader processes does not grow with the number of ranks."""
    asked: list[tuple[int, int]] = []
    real = SourceStream.clips

    def clips(self: SourceStream, first: int, count: int) -> tuple[int, ...]:
        asked.append((first, count))
        return real(self, first, count)

    monkeypatch.setattr(SourceStream, "clips", clips)
    sizes: dict[str, Any] = {"source_sizes": {"s": 1 << 15}, "weights": {"s": 1.0}, "num_steps": 1}
    bytes_of = {}
    for world_size in (1, 8, 64):
        asked.clear()
        (spec,) = plan(**sizes, batch_sizes={"s": 16 * world_size}, rank=world_size - 1, world_size=world_size)
        assert asked == [(16 * (world_size - 1), 16)]
        bytes_of[world_size] = len(pickle.dumps(spec))
    assert max(bytes_of.values()) < 1.2 * bytes_of[1]


def test_streams_do_not_depend_on_other_sources_or_batch_sizes() -> None:
    alone = SourceStream("video", 50, 7)
    taken = [clip for spec in plan() if spec.source == "video" for clip in spec.clip_indices]
    positions = [place for spec in plan() if spec.source == "video" for place in spec.positions]
    assert taken == [alone.clips(position, 1)[0] for position in positions]


def test_round_robin_follows_the_weights_at_every_moment() -> None:
    weights = {"a": 3.0, "b": 1.0, "c": 2.5, "never": 0.0}
    names = list(islice(source_order(weights, "round_robin", 0, 0), 1300))
    counts = Counter()
    for step, name in enumerate(names, start=1):
        counts[name] += 1
        for other in ("a", "b", "c"):
            assert abs(counts[other] - step * weights[other] / 6.5) < 1.01
    assert "never" not in counts
    assert list(islice(source_order(weights, "round_robin", 0, 700), 100)) == names[700:800]


def test_equal_weights_alternate() -> None:
    assert list(islice(source_order(WEIGHTS, "round_robin", 0, 0), 6)) == ["video", "image"] * 3


def test_weighted_order_draws_by_weight_and_by_step() -> None:
    weights = {"a": 3.0, "b": 1.0, "never": 0.0}
    names = list(islice(source_order(weights, "weighted", 4, 0), 2000))
    assert abs(names.count("a") / 2000 - 0.75) < 0.04 and "never" not in names
    assert list(islice(source_order(weights, "weighted", 4, 1500), 100)) == names[1500:1600]
    assert list(islice(source_order(weights, "weighted", 5, 0), 2000)) != names


@pytest.mark.parametrize(("accumulation", "clips", "epoch"), [(1, 50, 6.25), (2, 50, 3.125), (1, 48, 6.0)])
def test_the_configs_epoch_covers_the_source(accumulation: int, clips: int, epoch: float) -> None:
    """What frozen_fast.config counts as an epoch, rounded up to whole steps, reads every clip, and not before."""
    data = config_from_mapping({"data": {"sources": [{"name": "s", "path": "s"}]}}).data
    assert steps_per_epoch(data, {"s": clips}, {"s": 8 * accumulation}) == epoch
    specs = plan(
        source_sizes={"s": clips}, weights={"s": 1.0}, batch_sizes={"s": 8}, accumulation=accumulation, num_steps=9
    )
    seen = [{clip for spec in specs if spec.step <= step for clip in spec.clip_indices} for step in range(10)]
    assert len(seen[math.ceil(epoch)]) == clips > len(seen[math.ceil(epoch) - 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 5}, r"batch_sizes\[video\] \(or global_batch_size\): got 12; allowed: a multiple .*\(5\)"),
        ({"batch_sizes": {"video": 12}}, "nothing for source 'image'"),
        ({"batch_sizes": {"video": 0, "image": 1}}, "got 0"),
        ({"weights": {"video": -1.0, "image": 1.0}}, r"sources\[video\].weight: got -1.0"),
        ({"weights": {"video": float("nan"), "image": 1.0}}, "got nan"),
        ({"weights": {"video": 0.0, "image": 0.0}}, "at least one above 0"),
        ({"weights": {"video": 1.0}}, "one for each"),
        ({"order": "roundrobin"}, "did you mean 'round_robin'"),
        ({"accumulation": 0}, "gradient_accumulation_steps: got 0"),
        ({"source_sizes": {}, "weights": {}}, "at least one source"),
    ],
)
def test_mistakes_are_named_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_keyed_generators_differ_by_key_and_agree_otherwise() -> None:
    draws = {keyed_rng(0, *keys).integers(2**60) for keys in [("a", 1), ("a", 2), ("b", 1), (1, 1), ("a",)]}
    assert len(draws) == 5
    assert keyed_rng(-3, "a").random() == keyed_rng(-3, "a").random()
    assert np.isclose(np.mean([keyed_rng(0, "x", n).random() for n in range(2000)]), 0.5, atol=0.03)
