"""PyTorch's FSDP2 (fully_shard) behind Parallel.

Accelerate starts the processes and hands its fsdp_config over; fully_shard is applied here, the same way on GPUs and on
CPUs (Accelerate itself would leave FSDP out on a CPU). Each block of either tower is a unit, the rest is one more.
Weights, gradients and optimizer state are DTensors, cut along their first axis; they stay fp32, and bf16 is autocast as
without sharding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from frozen_fast.config import ExperimentConfig
from frozen_fast.models.repeated_blocks import find_repeated_blocks
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.optimizers import WEIGHT_AVERAGE
from frozen_fast.parallel.base import check_optimizer_state
from frozen_fast.parallel.launch_settings import fsdp_settings
from frozen_fast.parallel.sharded import ShardedParallel, check_elementwise

if TYPE_CHECKING:
    from accelerate import Accelerator


class FsdpParallel(ShardedParallel):
    """Parallel under FSDP2."""

    accelerate_types = ("MULTI_CPU", "FSDP")

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator, config, precision)
        self.strategy = "fsdp2"
        self._settings = fsdp_settings(os.environ)

    @classmethod
    def accelerator_for(cls, config: ExperimentConfig, cpu: bool, precision: str) -> Accelerator:
        """Accelerate's object; its fsdp_config is checked first.

        Raises:
            UserError: a setting that has no meaning here.
        """
        from accelerate import Accelerator

        check_elementwise(config, "FSDP2")
        fsdp_settings(os.environ)
        return Accelerator(cpu=cpu, mixed_precision="no")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Cut the parameters over the ranks, in place, and let the optimizer step on the parts."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.keep_hollow(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        reshard = self._settings.reshard_after_forward
        for block in model.repeated_blocks() if isinstance(model, RetrievalModel) else find_repeated_blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        sharded = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
        self._model, self._wrapped, self._optimizer = model, model, optimizer

    def forward(self, *inputs: Any) -> Any:
        """The model's forward pass under this run's autocast."""
        assert self._wrapped is not None, "prepare() first"
        with self.autocast():
            return self._wrapped(*inputs)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """One forward and backward pass of an optimizer step; gradients are exchanged in the last one only."""
        self._wrapped.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
        yield

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to the parameters'."""
        loss.backward()

    def update(self, gradient_clip_norm: float) -> Tensor | None:
        """Clip the gradients by the norm over all ranks' parts, apply them and clear them."""
        norm: Tensor | None = None
        if gradient_clip_norm:
            norm = _whole(nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_norm))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    # Whole tensors

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other; a collective."""
        for name, parameter in self.model.named_parameters():
            yield name, _whole(parameter)

    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """See ShardedParallel."""
        for name, parameter in self._parameters_with_state():
            if WEIGHT_AVERAGE in self.optimizer.state[parameter]:
                yield name, _whole(self.optimizer.state[parameter][WEIGHT_AVERAGE])

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state whole, by parameter name, on the CPU; a collective, empty but on rank 0."""
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters_with_state():
            tensors = {key: _whole(tensor) for key, tensor in self.optimizer.state[parameter].items()}
            if self.is_main:
                gathered[name] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        return gathered

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Put back what optimizer_state() gave, under this or another strategy.

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
                device = self.device if self._step_on_device() else torch.device("cpu")
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
        whole_state = {key: _whole(tensor).clone() for key, tensor in state.items() if tensor.shape == sharded.shape}
        whole = nn.Parameter(_whole(sharded).detach().clone(), requires_grad=False)
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
        return self.all_ranks(all(bool(_local(part).isfinite().all()) for part in parts))


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut(whole: Tensor, like: Tensor) -> DTensor:
    """This rank's part of a tensor that every rank holds whole, cut as another one is; no communication."""
    assert isinstance(like, DTensor), "parameters are sharded"
    tensor = whole.detach().to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
