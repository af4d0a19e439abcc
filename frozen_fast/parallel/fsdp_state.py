"""Whole weights and optimizer state under FSDP2, whose parameters and state are DTensors cut along their first axis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from frozen_fast.optimizers import WEIGHT_AVERAGE
from frozen_fast.parallel.model_state import check_optimizer_state
from frozen_fast.parallel.sharded_state import ShardedState


class FsdpState(ShardedState):
    """ShardedState under FSDP2."""

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter as a whole tensor; a collective."""
        for name, parameter in self.model.named_parameters():
            yield name, whole_tensor(parameter)

    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """See ShardedState."""
        for name, parameter in self.parameters_with_state():
            if WEIGHT_AVERAGE in self.optimizer.state[parameter]:
                yield name, whole_tensor(self.optimizer.state[parameter][WEIGHT_AVERAGE])

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the whole optimizer state by parameter name, on the CPU; a collective, empty on ranks other than 0."""
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters_with_state():
            tensors = {key: whole_tensor(tensor) for key, tensor in self.optimizer.state[parameter].items()}
            if self._ranks.is_main:
                gathered[name] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        return gathered

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the result of optimizer_state() of this or another strategy.

        Raises:
            UserError: it belongs to another model.
        """
        parameters = dict(self.model.named_parameters())
        check_optimizer_state(state, {name: parameter.shape for name, parameter in parameters.items()})
        for name, tensors in state.items():
            parameter = parameters[name]
            shaped = {key: tensor for key, tensor in tensors.items() if key != "step"}
            placed: dict[str, Tensor] = {key: _cut(tensor, parameter) for key, tensor in shaped.items()}
            if "step" in tensors:
                device = parameter.device if self.steps_on_device() else torch.device("cpu")
                placed["step"] = tensors["step"].to(device, copy=True)
            self.optimizer.state[parameter] = placed

    @contextlib.contextmanager
    def edit_parameter(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Give a parameter's whole weight and optimizer state for editing in place; every rank makes the same edit."""
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        sharded = owner._parameters[leaf]
        assert isinstance(sharded, DTensor), "prepare() first"
        state = self.optimizer.state.get(sharded, {})  # type: ignore[call-overload]
        whole_state = {
            key: whole_tensor(tensor).clone() for key, tensor in state.items() if tensor.shape == sharded.shape
        }
        whole = nn.Parameter(whole_tensor(sharded).detach().clone(), requires_grad=False)
        owner._parameters[leaf] = whole
        try:
            with torch.no_grad():
                yield whole_state
        finally:
            owner._parameters[leaf] = sharded  # type: ignore[assignment]
        with torch.no_grad():
            sharded.to_local().copy_(_cut(whole, sharded).to_local())
            for key, tensor in whole_state.items():
                state[key].to_local().copy_(_cut(tensor, sharded).to_local())

    def weights_are_finite(self) -> bool:
        """Whether no rank's part of the weights holds NaN or infinity (waits for the device)."""
        parts = (parameter.detach() for parameter in self.model.parameters())
        return self._ranks.all_ranks(all(bool(_local(part).isfinite().all()) for part in parts))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut(whole: Tensor, like: Tensor) -> DTensor:
    """Return this rank's shard of a tensor that every rank holds whole, sharded like another one; no communication."""
    assert isinstance(like, DTensor), "parameters are sharded"
    tensor = whole.detach().to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
