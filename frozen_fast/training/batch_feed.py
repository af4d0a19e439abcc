"""The batches of a run, on which all ranks agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from frozen_fast.config import ExperimentConfig, StagePlan
from frozen_fast.data import BadClipLedger, Batch, DataPosition, plan_steps, twin_pairs
from frozen_fast.parallel.base import Parallel
from frozen_fast.profiling.meter import StepTime
from frozen_fast.records.checkpoint import RunState
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.training.run_parts import RunParts
from frozen_fast.training.signals import StopRequest, stop_explains

_SEED_STEP = 2_654_435_769
"""Difference between the seeds of the clips' order before and after a roll-back; odd, so that seeds do not repeat."""


class StepGivenUp(Exception):
    """Raised by every rank at the same pass if a rank that was told to stop has lost its loader."""


@dataclass(frozen=True)
class _Read:
    """A batch, or None if this rank has none, and the function that waits for the ranks' agreement on it."""

    batch: Batch | None
    agreed: Callable[[], tuple[bool, list[int]]]
    saved: bool = False
    """A checkpoint has been written since; it answers the requests in the agreement."""


class BatchFeed:
    """Yields a stage's batches; for each, the ranks exchange errors and signals.

    With several ranks, the next pass's batch is read and its exchange started while the device computes a pass, so that
    no rank waits for the messages. A signal may then take effect one pass later, at the same step on all ranks.

    Attributes:
        position: the sources' position at the end of the last complete step.
        ledger: counts bad clips.
        decode_backends: source -> decoder -> number of clips, on this rank.
        stopped: a rank was told to stop.
        save_wanted: a checkpoint was requested on a rank, or one is due by checkpoints.every_minutes.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        parts: RunParts,
        stop: StopRequest,
        state: RunState | None,
        checkpoint_is_due: Callable[[], bool],
    ) -> None:
        """Start from the beginning, or from a checkpoint's `state`."""
        self._config, self._parallel, self._parts, self._stop = config, parallel, parts, stop
        self._checkpoint_is_due = checkpoint_is_due
        self.position = DataPosition() if state is None else DataPosition.from_json(state.position)
        write = folder.append_bad_clips if parallel.is_main else None
        self.ledger = BadClipLedger(write, config.data.decode.max_bad_share)
        if state is not None:
            self.ledger.resume(state.bad_clips)
        self.decode_backends: dict[str, Counter[str]] = {name: Counter() for name in parts.sources}
        self.stopped = False
        self.save_wanted = False
        self._ahead: _Read | None = None
        self._passes_left = 0

    def batches(self, plan: StagePlan, done: int) -> Iterator[Batch]:
        """Return the batches of a stage after `done` steps; reading starts with the first one."""
        self._ahead = None
        self._passes_left = (plan.steps - done) * plan.accumulation
        return self._planned(plan, done)

    def _planned(self, plan: StagePlan, done: int) -> Iterator[Batch]:
        config, sources, teachers = self._config, self._parts.sources, self._parts.teachers
        specs = plan_steps(
            {name: len(source) for name, source in sources.items()},
            {source.name: source.weight for source in config.data.sources},
            config.data.order,
            (config.seed + self._parts.roll_backs * _SEED_STEP) % 2**32,
            batch_sizes=plan.batch_sizes,
            frames=plan.frames if teachers is None else teachers.frames_to_read(plan.frames),
            accumulation=plan.accumulation,
            num_steps=plan.steps - done,
            start=self.position,
            rank=self._parallel.rank,
            world_size=self._parallel.world_size,
            pairs={one.name: twin_pairs(sources[one.name]) for one in config.data.sources if one.twins_together},
        )
        yield from self._parts.loader.batches(specs)

    def read_ahead(self, batches: Iterator[Batch], timing: StepTime) -> None:
        """Read the batch of the stage's next pass and start the ranks' agreement on it.

        Call it while the device has work. It does nothing after the last pass, after a stop, or with one process.
        """
        if self._parallel.world_size > 1 and self._passes_left and not self.stopped:
            with timing.stall_ahead():
                self._ahead = self._read(batches, timing)

    def checkpoint_saved(self) -> None:
        """Drop the requests for a checkpoint that were made before the one just written; every rank calls it."""
        self.save_wanted = False
        self._ahead = None if self._ahead is None else replace(self._ahead, saved=True)

    def _read(self, batches: Iterator[Batch], timing: StepTime) -> _Read:
        """Read the next batch, and start the agreement on it or on this rank's error."""
        error: Exception | None = None
        batch: Batch | None = None
        self._passes_left -= 1
        try:
            with timing.reading():
                batch = next(batches)
        except StopIteration:
            error = RuntimeError("the loader ended before the stage did")
        except Exception as caught:  # told to the other ranks, then raised by next_batch
            error = caught
        if error is not None and stop_explains(error, lambda: self._stop.asked):
            error = None
        wanted = self._stop.take_save_request() or self._checkpoint_is_due()
        counts = (0 if batch is None else len(batch.bad_clips), int(batch is None), int(wanted))
        return _Read(batch, self._parallel.begin_agreement(error, stop=self._stop.asked, counts=counts))

    def next_batch(self, batches: Iterator[Batch], timing: StepTime) -> tuple[Batch, int]:
        """Return the next batch and its number of bad clips over all ranks; the ranks exchange errors first.

        Raises:
            UserError: a clip that cannot be read under policy error, or too many of them; on every rank.
            StepGivenUp: a rank that was told to stop has lost its loader; on every rank.
        """
        with timing.stall():
            read, self._ahead = self._ahead or self._read(batches, timing), None
            stop, (bad, without, save) = read.agreed()
        batch = read.batch
        self.stopped = self.stopped or stop
        self.save_wanted = self.save_wanted or (save > 0 and not read.saved)
        if without:
            raise StepGivenUp
        assert batch is not None
        self.decode_backends[batch.source] += batch.backends
        found = self._parallel.gather_objects(batch.bad_clips) if bad else []
        self.ledger.record(
            batch.spec.step,
            len(batch.clip_ids) * self._parallel.world_size,
            [clip for clips in found for clip in clips],
        )
        self.ledger.check()
        return batch, bad
