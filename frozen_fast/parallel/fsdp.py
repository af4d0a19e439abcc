"""PyTorch's FSDP2 (fully_shard) behind Parallel.

Accelerate starts the processes and reads its fsdp_config. This module applies fully_shard, on GPUs and on CPUs
(Accelerate itself ignores FSDP on a CPU). Each block of either tower is a unit, and the remaining parameters are one
more. Weights, gradients and optimizer state are fp32 DTensors sharded along their first axis. bf16 is autocast, as
without sharding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.models.repeated_blocks import find_repeated_blocks
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.fsdp_state import FsdpState, whole_tensor
from frozen_fast.parallel.launch_settings import fsdp_settings
from frozen_fast.parallel.sharded_state import check_elementwise, hollow_copy

if TYPE_CHECKING:
    from accelerate import Accelerator


class FsdpParallel(Parallel):
    """Parallel under FSDP2."""

    accelerate_types = ("MULTI_CPU", "FSDP")
    holds_whole_weights = False

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator, config, precision)
        self.strategy = "fsdp2"
        self._settings = fsdp_settings(os.environ)

    @classmethod
    def accelerator_for(cls, config: ExperimentConfig, cpu: bool, precision: str) -> Accelerator:
        """Check fsdp_config, and return Accelerate's object.

        Raises:
            UserError: a setting that has no meaning here.
        """
        from accelerate import Accelerator

        check_elementwise(config, "FSDP2")
        fsdp_settings(os.environ)
        return Accelerator(cpu=cpu, mixed_precision="no")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard the parameters over the ranks, in place, and let the optimizer update the shards."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        hollow = hollow_copy(model)
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
        self.state = FsdpState(model, optimizer, self._optimizer_kind, hollow=hollow, ranks=self)

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

    def _gradient_norm(self) -> Tensor:
        return whole_tensor(super()._gradient_norm())

    @property
    def _fused_kernel_skips(self) -> bool:
        return False  # found_inf is no DTensor
