"""Agreement of ranks over a CPU-only process group, apart from the device's collectives.

Once per forward pass, the ranks exchange whether one was told to stop, whether one has failed, and small counts. So an
error on one rank reaches the others at the next pass instead of leaving them in a collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from frozen_fast.errors import UserError


class PeerError(RuntimeError):
    """Another rank failed; this rank stops because of it."""


class RankAgreement:
    """This process's rank and the agreement with the others.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        failure_is_shared: agree() has raised, so every rank is about to leave.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Make the CPU-only group; a collective where there is more than one rank."""
        self.rank = rank
        self.world_size = world_size
        self.failure_is_shared = False
        self._control = dist.new_group(backend="gloo") if world_size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder (rank 0)."""
        return self.rank == 0

    def agree(
        self, error: BaseException | None = None, *, stop: bool = False, counts: Sequence[int] = ()
    ) -> tuple[bool, list[int]]:
        """Exchange this rank's state (error, stop request) with all ranks; every rank must call it.

        Args:
            error: what went wrong here since the last agreement.
            stop: this rank was told to stop.
            counts: numbers to be added up over ranks.

        Returns:
            (whether any rank was told to stop, the sums of counts).

        Raises:
            BaseException: this rank's own error.
            UserError: another rank's mistake in data, config or arguments.
            PeerError: another rank's other error.
        """
        return self.begin_agreement(error, stop=stop, counts=counts)()

    def begin_agreement(
        self, error: BaseException | None = None, *, stop: bool = False, counts: Sequence[int] = ()
    ) -> Callable[[], tuple[bool, list[int]]]:
        """Start agree() and return a function that waits for its result; the exchange runs in the background.

        Every rank must call both, in the same order among its other collectives over the CPU-only group.
        """
        row = torch.tensor([error is not None, stop, *counts], dtype=torch.int64)
        exchange = None if self._control is None else dist.all_reduce(row, group=self._control, async_op=True)

        def end() -> tuple[bool, list[int]]:
            if exchange is not None:
                exchange.wait()
            failed, stopped, *sums = row.tolist()
            if failed:
                self._raise_failure(error)
            return bool(stopped), sums

        return end

    def _raise_failure(self, error: BaseException | None) -> NoReturn:
        """Raise this rank's own error, or report another rank's; a collective."""
        if self._control is None:
            assert error is not None
            raise error
        self.failure_is_shared = True
        kind = type(error).__name__
        own = None if error is None else (isinstance(error, UserError), f"{kind}: {error}", str(error))
        reports = self.gather_objects(own)
        if error is not None:
            raise error
        failed_rank, report = next((index, report) for index, report in enumerate(reports) if report is not None)
        if report[0]:
            raise UserError(report[2])
        raise PeerError(f"rank {failed_rank} failed: {report[1]}")

    def all_ranks(self, condition: bool) -> bool:
        """Whether a condition holds on every rank; a collective."""
        if self._control is None:
            return condition
        flag = torch.tensor([condition], dtype=torch.int64)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._control)
        return bool(flag.item())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a part without collectives; if it fails on one rank, it fails on all of them."""
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:  # told to the other ranks, then raised again by agree()
            error = caught
        self.agree(error)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, over the CPU-only group."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values
