"""Samplers of sources and clips: pure functions of the seed, the step and the rank.

A source is an endless stream: one permutation of its clips per epoch of the source, joined. An optimizer step takes
the next clips of one source's stream, so (step, clips taken from each stream) is the complete state for resuming.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from frozen_fast.data.plan.seeds import keyed_rng
from frozen_fast.errors import UserError, unknown_name

logger = logging.getLogger(__name__)

Order = Literal["round_robin", "weighted"]
ORDERS = ("round_robin", "weighted")


@dataclass(frozen=True)
class DataPosition:
    """Position of a run in its sources.

    Attributes:
        step: optimizer steps done.
        consumed: source name -> stream position of the next clip (clips taken so far, those skipped included).
    """

    step: int = 0
    consumed: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"step": self.step, "consumed": dict(self.consumed)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataPosition:
        """Restore from a checkpoint."""
        return cls(int(value["step"]), {name: int(count) for name, count in value["consumed"].items()})


@dataclass(frozen=True)
class BatchSpec:
    """One forward pass of one rank.

    Attributes:
        step: optimizer step, from 1 as in steps.jsonl.
        pass_index: forward pass inside the step, from 0.
        source: name of the source, the same on all ranks and for all passes of a step.
        positions: stream positions of this rank's clips.
        clip_indices: indices of this rank's clips in the source.
        batch_positions: stream positions of the clips of all ranks.
        twins_together: the stream holds the clips in pairs.
        frames: frames per video clip of the stage.
        seed: the run's seed.
        last_pass_of_step: the optimizer steps after this pass.
        after: position after this pass; checkpoints store that of a step's last pass.
    """

    step: int
    pass_index: int
    source: str
    positions: tuple[int, ...]
    clip_indices: tuple[int, ...]
    batch_positions: range
    twins_together: bool
    frames: int
    seed: int
    last_pass_of_step: bool
    after: DataPosition

    def describe(self) -> str:
        """Name of the batch for messages."""
        return f"the batch of step {self.step}, pass {self.pass_index}, source {self.source!r}"


def plan_steps(
    source_sizes: Mapping[str, int],
    weights: Mapping[str, float],
    order: Order,
    seed: int,
    *,
    batch_sizes: Mapping[str, int],
    frames: int,
    accumulation: int = 1,
    num_steps: int,
    start: DataPosition,
    rank: int = 0,
    world_size: int = 1,
    pairs: Mapping[str, np.ndarray] | None = None,
) -> Iterator[BatchSpec]:
    """The forward passes of optimizer steps start.step + 1 to start.step + num_steps.

    Rank r gets the r-th contiguous slice of each batch, so that all ranks together see exactly the batch that one
    process would see.

    Args:
        source_sizes: source name -> number of clips, in the order of the config.
        weights: source name -> share of the optimizer steps; 0: never.
        order: round_robin: in turn, evenly by weight; weighted: drawn by weight.
        seed: the run's seed.
        batch_sizes: source name -> clips per forward pass over all ranks.
        frames: frames per video clip.
        accumulation: forward passes per optimizer step, all from one source.
        num_steps: optimizer steps to plan.
        start: current position of the run.
        rank: this process.
        world_size: number of processes.
        pairs: source name -> indices of clips that come one after the other, [clips / 2, 2] (sources.twin_pairs);
            with an even batch size they share a batch. A source without an entry is shuffled clip by clip.

    Raises:
        UserError: immediately, for invalid sizes, weights or batch sizes.
    """
    _check_weights(source_sizes, weights, order)
    for name in source_sizes:
        _check_batch(name, source_sizes[name], batch_sizes, world_size, warn=rank == 0)
    if accumulation < 1:
        raise UserError(f"curriculum.gradient_accumulation_steps: got {accumulation}; allowed: from 1")
    pairs = pairs or {}
    streams = {name: SourceStream(name, size, seed, pairs.get(name)) for name, size in source_sizes.items()}

    def specs() -> Iterator[BatchSpec]:
        consumed = {name: start.consumed.get(name, 0) for name in source_sizes}
        names = source_order(weights, order, seed, start.step)
        for step in range(start.step + 1, start.step + num_steps + 1):
            name = next(names)
            size = batch_sizes[name]
            share = size // world_size
            for pass_index in range(accumulation):
                first = streams[name].batch_start(consumed[name], size)
                positions = range(first, first + size)
                own = positions[rank * share : (rank + 1) * share]
                clips = streams[name].clips(own.start, share)
                consumed[name] = first + size
                last = pass_index == accumulation - 1
                after = DataPosition(step if last else step - 1, dict(consumed))
                yield BatchSpec(
                    step,
                    pass_index,
                    name,
                    tuple(own),
                    clips,
                    positions,
                    name in pairs,
                    frames,
                    seed,
                    last,
                    after,
                )

    return specs()


def source_order(weights: Mapping[str, float], order: Order, seed: int, first_step: int) -> Iterator[str]:
    """The source of each optimizer step from first_step (0 is the run's first), endlessly.

    round_robin assigns the time (k + 1/2) / weight to the k-th step of a source and sorts the steps by time, ties in
    the order of the config; weighted draws each step independently.
    """
    names = [name for name in weights if weights[name] > 0]
    if order == "weighted":
        edges = np.cumsum([weights[name] for name in names])
        step = first_step
        while True:
            draw = keyed_rng(seed, "source of a step", step).random() * edges[-1]
            yield names[min(int(np.searchsorted(edges, draw, side="right")), len(names) - 1)]
            step += 1
    turns = [(0.5 / weights[name], place, 0) for place, name in enumerate(names)]
    heapq.heapify(turns)
    step = 0
    while True:
        _, place, count = turns[0]
        heapq.heapreplace(turns, ((count + 1.5) / weights[names[place]], place, count + 1))
        if step >= first_step:
            yield names[place]
        step += 1


class SourceStream:
    """The endless stream of one source's clips; pairs [size / 2, 2], if given, are shuffled as wholes."""

    _KEPT_EPOCHS = 3

    def __init__(self, name: str, size: int, seed: int, pairs: np.ndarray | None = None) -> None:
        assert pairs is None or 2 * len(pairs) == size, "pairs hold every clip once"
        self.size = size
        self._pairs = pairs
        self._name = name
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def clips(self, first: int, count: int) -> tuple[int, ...]:
        """The clip indices at stream positions first .. first + count - 1."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), self.size)
            found += self._order(epoch)[place : place + count - len(found)].tolist()
        return tuple(found)

    def batch_start(self, position: int, batch_size: int) -> int:
        """Start of the next batch: position, or the next epoch if the batch would otherwise contain a clip twice.

        A batch across two epochs has no duplicates if it takes at most a third of the source from either; one
        that takes more starts with the new epoch, and the rest of the old one (other clips each time) is skipped.
        """
        left = self.size - position % self.size
        if batch_size <= left or batch_size > self.size:
            return position
        third = self.size // 3 if self._pairs is None else 2 * (len(self._pairs) // 3)
        return position if left <= third and batch_size - left <= third else position + left

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if self._pairs is None:
                self._orders[epoch] = epoch_order(self._name, self.size, self._seed, epoch)
            else:
                order = epoch_order(self._name, len(self._pairs), self._seed, epoch)
                self._orders[epoch] = self._pairs[order].reshape(-1)
            for old in sorted(self._orders)[: -self._KEPT_EPOCHS]:
                del self._orders[old]
        return self._orders[epoch]


def epoch_order(name: str, size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of a source's clips in one epoch, [size] int64: a permutation.

    Its first third shares no clip with the last third of the epoch before: such clips are swapped with others of the
    middle third. (The last third stays as drawn, so that no epoch depends on more than the one before.)
    """
    order = _drawn_order(name, size, seed, epoch)
    third = size // 3
    if epoch == 0 or third == 0:
        return order
    recent = np.zeros(size, dtype=bool)
    recent[_drawn_order(name, size, seed, epoch - 1)[size - third :]] = True
    early = np.flatnonzero(recent[order[:third]])
    middle = third + np.flatnonzero(~recent[order[third : size - third]])[: len(early)]
    order[early], order[middle] = order[middle], order[early]
    return order


def _drawn_order(name: str, size: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_rng(seed, "order of a source", name, epoch).permutation(size)


def _check_weights(source_sizes: Mapping[str, int], weights: Mapping[str, float], order: str) -> None:
    if order not in ORDERS:
        raise unknown_name("data.order", order, ORDERS)
    if not source_sizes:
        raise UserError("data.sources: got none; allowed: at least one source")
    if list(weights) != list(source_sizes):
        raise UserError(f"data.sources: weights for {list(weights)}; allowed: one for each of {list(source_sizes)}")
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise UserError(f"data.sources[{name}].weight: got {weight}; allowed: a number from 0")
    if not any(weights.values()):
        raise UserError("data.sources[].weight: got 0 for every source; allowed: at least one above 0")


def _check_batch(name: str, size: int, batch_sizes: Mapping[str, int], world_size: int, *, warn: bool) -> None:
    if name not in batch_sizes:
        raise UserError(f"curriculum.stages[].batch_sizes: nothing for source {name!r}; allowed: a size for each")
    batch = batch_sizes[name]
    if batch < 1 or batch % world_size:
        raise UserError(
            f"curriculum.stages[].batch_sizes[{name}] (or global_batch_size): got {batch}; allowed: a multiple of the "
            f"number of processes ({world_size})"
        )
    if warn and batch > size:
        logger.warning("source %s: a batch of %d contains some of its %d clips more than once", name, batch, size)
