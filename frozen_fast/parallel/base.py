"""Forward, backward and optimizer steps over all processes: a thin layer over Accelerate.

Parallel covers one process and distributed data parallel; deepspeed and fsdp hold the sharding strategies. The whole
weights and optimizer state of each strategy are its ModelState.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from frozen_fast.config import ExperimentConfig
from frozen_fast.optimizers import WEIGHT_AVERAGE, optimizer_kind
from frozen_fast.parallel.agreement import RankAgreement
from frozen_fast.parallel.model_state import ModelState

if TYPE_CHECKING:
    from accelerate import Accelerator


class Parallel(RankAgreement):
    """This process's rank, and the model and optimizer under a sharding strategy.

    Attributes:
        device: where the model runs.
        precision: "bf16" (autocast over fp32 weights) or "fp32".
        precision_reason: why this precision was chosen, in one line.
        distributed_type: Accelerate's name for the kind of launch.
        strategy: "one process", "ddp", "zero1" to "zero3" (with "+offload") or "fsdp2".
        state: the whole weights and optimizer state; available after prepare().
    """

    state: ModelState

    accelerate_types: tuple[str, ...] = ("NO", "MULTI_CPU", "MULTI_GPU")
    """Accelerate's distributed types under which this strategy runs."""

    holds_whole_weights = True
    """Whether every rank holds all weights, so that it can run a pass without the other ranks."""

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.precision, self.precision_reason = precision
        self.distributed_type = str(accelerator.distributed_type.value)
        self.strategy = "ddp" if self.world_size > 1 else "one process"
        self._optimizer_kind = optimizer_kind(config.optimizer)
        self._gradient_exchange = config.training.gradient_exchange
        self._model: nn.Module | None = None
        self._wrapped: nn.Module | None = None
        self._optimizer: Any = None

    @classmethod
    def accelerator_for(cls, config: ExperimentConfig, cpu: bool, precision: str) -> Accelerator:
        """Accelerate's object for this strategy; joins the process group."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        return Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group, so that no rank aborts at exit, and forget Accelerate's process-wide state.

        Args:
            failed: this rank is raising an error that the other ranks do not know of. They may wait in a collective
                that this rank would have to join, so the group is not destroyed before the process ends.
        """
        from accelerate.state import AcceleratorState, GradientState

        if dist.is_available() and dist.is_initialized() and not failed:
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer for this strategy; the bare model can still be used for evaluation and saving."""
        self._model = model
        self._wrapped, self._optimizer = self.accelerator.prepare(model, optimizer)
        if self._gradient_exchange == "bf16" and isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped.register_comm_hook(None, bf16_compress_hook)  # type: ignore[arg-type]
        self.state = ModelState(model, self.optimizer, self._optimizer_kind)

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        assert self._model is not None, "prepare() first"
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The bare optimizer (its param_groups carry the learning rates)."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def forward(self, *inputs: Any) -> Any:
        """The wrapped model's forward pass under this run's autocast; outputs are fp32."""
        assert self._wrapped is not None, "prepare() first"
        return self._wrapped(*inputs)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as in training, for calls that do not go through forward()."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """One forward and backward pass of an optimizer step; gradients are exchanged in the last one only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self._wrapped):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to the parameters'."""
        self.accelerator.backward(loss)

    def update(self, gradient_clip_norm: float, *, skip_non_finite: bool = False) -> Tensor:
        """Clip the gradients, apply them and clear them.

        Args:
            gradient_clip_norm: largest norm; 0: no clipping.
            skip_non_finite: if the norm is NaN or infinite, no rank applies the gradients. The host synchronises with
                the device to read the norm, unless a fused kernel decides on the device.

        Returns:
            The norm of all ranks' gradients before clipping: a scalar tensor on the device.
        """
        norm = self._gradient_norm()
        if gradient_clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), gradient_clip_norm, norm)
        if not skip_non_finite:
            self._optimizer.step()
        elif self._fused_kernel_skips:
            vars(self.optimizer)["found_inf"] = norm.isfinite().logical_not().float()
            self._optimizer.step()
        elif bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    @property
    def _fused_kernel_skips(self) -> bool:
        """Whether the optimizer's kernel skips the update if its found_inf is 1, as for fp16."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        knows = type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        return knows and fused and WEIGHT_AVERAGE not in self._optimizer_kind.state_keys

    def release(self) -> None:
        """Release model and optimizer; prepare() may then be called with others."""
        self._model = self._wrapped = self._optimizer = None
        del self.state
        self.accelerator.free_memory()

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generators by step and rank.

    Dropout then depends on step and rank only. A resumed run draws the same values as an uninterrupted one, and
    checkpoints contain no generator state.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)
