"""What the sharding strategies share: whole tensors on rank 0, and a whole copy of the model for evaluation."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.optimizers import optimizer_kind
from frozen_fast.parallel.base import Parallel


class ShardedParallel(Parallel, ABC):
    """Parallel whose ranks hold parts of the model; subclasses say how a whole tensor is put together.

    Gathering goes tensor by tensor, in the same order on every rank, so that no rank holds more than one whole tensor
    beyond its shards; rank 0 keeps them on the CPU.
    """

    gathers_copies = True
    _hollow: nn.Module | None = None

    @abstractmethod
    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other; a collective, to be run to its end on every rank."""

    @abstractmethod
    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """The average of every trained parameter whole, one after the other; none where none is kept. A collective."""

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer whole, by name, on the CPU; a collective, empty but on rank 0."""
        gathered = {name: tensor.detach().cpu().clone() for name, tensor in self.whole_parameters() if self.is_main}
        if not self.is_main:
            return {}
        order = self.model.state_dict().keys()
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in self.model.named_buffers() if name in order}
        return {name: {**gathered, **buffers}[name] for name in order}

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """A copy of the model with whole weights (or their averages) on this rank's device, while it is used."""
        assert self._hollow is not None, "prepare() first"
        whole = copy.deepcopy(self._hollow)
        parameters = {name: nn.Parameter(tensor.detach().clone(), False) for name, tensor in self.whole_parameters()}
        for name, average in self.whole_averages():
            parameters[name] = nn.Parameter(average.detach().clone(), False)
        buffers = dict(self.model.named_buffers())
        state = {name: parameters.get(name, buffers.get(name)) for name in whole.state_dict()}
        whole.load_state_dict(state, assign=True)  # type: ignore[arg-type]
        for name, value in vars(self.model).items():
            if isinstance(value, (bool, int, float, str)):  # such as how many frames it has learned
                setattr(whole, name, value)
        yield whole

    def keep_hollow(self, model: nn.Module) -> None:
        """Remember the model's structure without its parameters, before a strategy takes it apart."""
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in model.parameters()
        }
        self._hollow = copy.deepcopy(model, memo)

    def all_ranks(self, condition: bool) -> bool:
        """Whether a condition holds on every rank."""
        if self._control is None:
            return condition
        flag = torch.tensor([condition], dtype=torch.int64)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._control)
        return bool(flag.item())


def check_elementwise(config: ExperimentConfig, strategy: str) -> None:
    """Refuse an optimizer that looks at whole parameters where a strategy cuts them.

    Raises:
        UserError: naming optimizer.name.
    """
    if not optimizer_kind(config.optimizer).elementwise:
        raise UserError(
            f"optimizer.name: got {config.optimizer.name!r} under {strategy}, which cuts parameters, but its update "
            "needs whole ones; allowed: an elementwise optimizer (adamw, adam, radam, lion), or ddp"
        )
