"""Weights and optimizer state under a sharding strategy: whole tensors on rank 0, and a whole model for evaluation."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.optimizers import OptimizerKind, optimizer_kind
from frozen_fast.parallel.agreement import RankAgreement
from frozen_fast.parallel.model_state import ModelState


class ShardedState(ModelState, ABC):
    """ModelState whose ranks hold parts of the model; subclasses gather whole tensors.

    Tensors are gathered one at a time, in the same order on every rank, so that a rank holds at most one whole tensor
    beyond its shards. Rank 0 stores them on the CPU.
    """

    gathers_copies = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kind: OptimizerKind,
        *,
        hollow: nn.Module,
        ranks: RankAgreement,
    ) -> None:
        """Initialise the state.

        Args:
            model: the bare model, sharded.
            optimizer: the optimizer that steps on the shards.
            kind: the state that this optimizer keeps.
            hollow: hollow_copy() of the model, made before it was sharded.
            ranks: rank and world size.
        """
        super().__init__(model, optimizer, kind)
        self._hollow = hollow
        self._ranks = ranks

    @abstractmethod
    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every whole parameter; a collective, which every rank must exhaust."""

    @abstractmethod
    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole average of every trained parameter; nothing if no averages are kept. A collective."""

    def weights(self) -> dict[str, Tensor]:
        """Return every whole parameter and buffer by name, on the CPU; a collective, empty on ranks other than 0."""
        gathered = {
            name: tensor.detach().cpu().clone() for name, tensor in self.whole_parameters() if self._ranks.is_main
        }
        if not self._ranks.is_main:
            return {}
        order = self.model.state_dict().keys()
        buffers = {name: tensor.detach().cpu().clone() for name, tensor in self.model.named_buffers() if name in order}
        return {name: {**gathered, **buffers}[name] for name in order}

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """Provide a copy of the model with whole weights (or their averages) on this rank's device."""
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


def hollow_copy(model: nn.Module) -> nn.Module:
    """Copy a model without the values of its parameters; call this before a strategy shards the model."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def check_elementwise(config: ExperimentConfig, strategy: str) -> None:
    """Refuse optimizers that need whole parameters under a strategy that shards them.

    Raises:
        UserError: naming optimizer.name.
    """
    if not optimizer_kind(config.optimizer).elementwise:
        raise UserError(
            f"optimizer.name: got {config.optimizer.name!r} under {strategy}, which cuts parameters, but its update "
            "needs whole ones; allowed: an elementwise optimizer (adamw, adam, radam, lion), or ddp"
        )
