"""How processes share the work: the one thin layer over Accelerate.

Everything that depends on the strategy is behind Parallel: wrapping, gradient synchronisation, clipping, whole weights
and optimizer state, editing a parameter in place. The engine, the stages and the checkpoints see names and whole
tensors. This class is one process or distributed data parallel; ZeRO is in deepspeed, FSDP2 in fsdp.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig, extensions
from frozen_fast.errors import UserError
from frozen_fast.optimizers import WEIGHT_AVERAGE, optimizer_kind
from frozen_fast.parallel.agreement import RankAgreement
from frozen_fast.parallel.launch_settings import check_precision, requested_strategy
from frozen_fast.parallel.precision import choose_precision

if TYPE_CHECKING:
    from accelerate import Accelerator


class Parallel(RankAgreement):
    """This process's place among the others, and the model and optimizer as they are shared between them.

    Attributes:
        device: where the model runs.
        precision: "bf16" (autocast over fp32 weights) or "fp32".
        precision_reason: one line, why.
        distributed_type: Accelerate's name for the kind of launch.
        strategy: what shares the work: "one process", "ddp", "zero1" to "zero3" (with "+offload"), "fsdp2".
    """

    accelerate_types: tuple[str, ...] = ("NO", "MULTI_CPU", "MULTI_GPU")
    """Accelerate's distributed types under which this strategy runs."""
    gathers_copies = False
    """weights() and optimizer_state() return copies on the CPU, which no later step changes."""

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.precision, self.precision_reason = precision
        self.distributed_type = str(accelerator.distributed_type.value)
        self.strategy = "ddp" if self.world_size > 1 else "one process"
        self._optimizer_kind = optimizer_kind(config.optimizer)
        self._model: nn.Module | None = None
        self._wrapped: nn.Module | None = None
        self._optimizer: Any = None

    @classmethod
    def start(cls, config: ExperimentConfig) -> Parallel:
        """Join the other processes under the launch's strategy, and check that the world is what was asked for.

        Raises:
            UserError: no such device, a world of another size than asked for, or a launch that contradicts the
                experiment.
        """
        training = config.training
        strategy = requested_strategy(os.environ)
        check_gpus_are_there(os.environ, training.device, strategy)
        cpu = _wants_cpu(training.device)
        check_precision(os.environ, training)
        device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        precision = choose_precision(training.precision, device)
        kind: type[Parallel] = extensions.strategies.load(strategy)
        accelerator = kind.accelerator_for(config, cpu, precision[0])
        check_world(accelerator.num_processes, training.expected_world_size)
        if accelerator.distributed_type.name not in kind.accelerate_types:
            raise UserError(
                f"accelerate config: got distributed type {accelerator.distributed_type.value} for {strategy}; "
                f"allowed: {', '.join(kind.accelerate_types)}"
            )
        return kind(accelerator, config, precision)

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
            failed: an error is on its way out that the other ranks do not know of; they may wait in a collective that
                this rank would have to join, so the group is left to the end of the process.
        """
        from accelerate.state import AcceleratorState, GradientState

        if dist.is_available() and dist.is_initialized() and not failed:
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    # Model and optimizer

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer for this strategy; the bare model stays usable for evaluation and saving."""
        self._model = model
        self._wrapped, self._optimizer = self.accelerator.prepare(model, optimizer)

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

    def update(self, gradient_clip_norm: float) -> Tensor | None:
        """Clip the gradients, apply them and clear them.

        Args:
            gradient_clip_norm: largest norm; 0: no clipping.

        Returns:
            The norm before clipping, a scalar tensor; None without clipping.
        """
        norm = None
        if gradient_clip_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), gradient_clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """A model with whole weights for evaluation: ranks may call it unequally often. A collective at its start.

        With optimizer.weight_average_decay its weights are the averages, for as long as it is used.
        """
        state = self.optimizer.state
        averages = {p: state[p][WEIGHT_AVERAGE] for p in self.model.parameters() if WEIGHT_AVERAGE in state.get(p, {})}
        kept = {parameter: parameter.detach().clone() for parameter in averages}
        with torch.no_grad():
            for parameter, average in averages.items():
                parameter.copy_(average)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for parameter, weight in kept.items():
                    parameter.copy_(weight)

    # Whole tensors, whatever the sharding

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer whole, by name. Under sharding a collective, and empty but on rank 0."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state whole, by parameter name (exp_avg, exp_avg_sq, step); empty before the first step.

        Under sharding strategies a collective, and empty but on rank 0.
        """
        found = {name: dict(self.optimizer.state[parameter]) for name, parameter in self._parameters_with_state()}
        if self._optimizer_kind.step_in_group:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in self.optimizer.param_groups:
                for name in (names[id(parameter)] for parameter in group["params"]):
                    if name in found:
                        found[name]["step"] = torch.as_tensor(group["step"])
        return found

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Put back what optimizer_state() gave.

        Raises:
            UserError: it belongs to another model.
        """
        parameters = dict(self.model.named_parameters())
        check_optimizer_state(state, {name: parameter.shape for name, parameter in parameters.items()})
        for name, tensors in state.items():
            parameter = parameters[name]
            on_device = {}
            for key, tensor in tensors.items():
                whole = key != "step" or self._step_on_device()
                on_device[key] = tensor.to(parameter.device if whole else "cpu", copy=True)
            if self._optimizer_kind.step_in_group:
                step = on_device.pop("step")
                for group in self.optimizer.param_groups:
                    if any(member is parameter for member in group["params"]):
                        group["step"] = step
            self.optimizer.state[parameter] = on_device

    @contextlib.contextmanager
    def edit_parameter(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Give a parameter's whole optimizer state for editing in place, while its weight may be edited too.

        Yields:
            {"exp_avg": ..., "exp_avg_sq": ...} with the parameter's shape; empty before the first optimizer step.
        """
        parameter = dict(self.model.named_parameters())[name]
        state = self.optimizer.state.get(parameter, {})
        with torch.no_grad():
            yield {key: tensor for key, tensor in state.items() if tensor.shape == parameter.shape}

    def weights_are_finite(self) -> bool:
        """Whether no parameter holds NaN or infinity (waits for the device)."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        largest = torch._foreach_norm(parameters, float("inf"))  # a 2-norm of large weights would overflow
        return bool(torch.stack(largest).isfinite().all())

    def _parameters_with_state(self) -> list[tuple[str, nn.Parameter]]:
        state = self.optimizer.state
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter in state]

    def _step_on_device(self) -> bool:
        """Fused and capturable AdamW count their steps on the device."""
        group = self.optimizer.param_groups[0]
        return bool(group.get("fused") or group.get("capturable"))

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generators from what identifies a step on a rank.

    Dropout then depends on nothing else, so that a resumed run draws what the uninterrupted one would have drawn and
    no generator state has to be kept in a checkpoint.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def check_optimizer_state(state: dict[str, dict[str, Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Refuse a checkpoint's optimizer state that is another model's.

    Raises:
        UserError: naming the parameter.
    """
    for name, tensors in state.items():
        if name not in shapes:
            raise UserError(f"checkpoint: got optimizer state for {name!r}; allowed: this model's parameters")
        for key, tensor in tensors.items():
            if tensor.ndim and tensor.shape != shapes[name]:
                got = f"got {key} of shape {list(tensor.shape)} for {name}"
                raise UserError(f"checkpoint: {got}; allowed: {list(shapes[name])}")


def _wants_cpu(requested: str) -> bool:
    """Whether to run on the CPU; `accelerate launch --cpu` says so in ACCELERATE_USE_CPU."""
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if requested == "cuda":
        if not torch.cuda.is_available():
            raise UserError("training.device: got 'cuda', but PyTorch finds no CUDA device; allowed: auto, cpu")
        if told_cpu:
            raise UserError("training.device: got 'cuda', but accelerate was launched with use_cpu; make them agree")
        return False
    return requested == "cpu" or told_cpu or not torch.cuda.is_available()


def check_gpus_are_there(environ: Mapping[str, str], device: str, strategy: str) -> None:
    """Refuse an accelerate config for several GPUs on a machine without any, unless the experiment asks for the CPU.

    Under DeepSpeed and FSDP2 the files for the CPU say use_cpu false too, so there several processes may share a CPU.

    Raises:
        UserError: naming the config for CPU processes.
    """
    told = environ.get("ACCELERATE_USE_CPU", "").lower()
    processes = int(environ.get("WORLD_SIZE", "1"))
    wants_gpus = strategy == "ddp" and device == "auto" and processes > 1 and told in ("false", "0", "no")
    if wants_gpus and not torch.cuda.is_available():
        raise UserError(
            f"accelerate config: got use_cpu false and {processes} processes, but PyTorch finds no CUDA device; "
            "allowed: configs/accelerate/cpu_2.yaml (CPU processes), or training.device=cpu"
        )


def check_world(num_processes: int, expected: int | None) -> None:
    """Refuse a world of another size than the launcher started, or than training.expected_world_size."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise UserError(
            f"number of processes: got {num_processes} where the launcher started {launched} (WORLD_SIZE); "
            "launch with torchrun or an accelerate config from configs/accelerate/"
        )
    if expected is not None and expected != num_processes:
        raise UserError(f"training.expected_world_size: got {num_processes} process(es); allowed: {expected}")
