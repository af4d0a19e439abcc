"""DeepSpeed ZeRO stages 1, 2 and 3 behind Parallel.

DeepSpeed's engine wraps the model, exchanges gradients while they are computed, clips and steps. It keeps a second
fp32 copy of the weights, cut over the ranks, and the optimizer's state beside it, as one flat tensor per parameter
group ("flat partition"); stage 3 cuts the model's own weights as well. bf16 is DeepSpeed's torch_autocast over fp32
weights, so that training.precision means what it means elsewhere. Its own checkpoint format is not used: whole tensors
are gathered by name, and put back by name, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.errors import UserError
from frozen_fast.optimizers import WEIGHT_AVERAGE
from frozen_fast.parallel.base import check_optimizer_state
from frozen_fast.parallel.launch_settings import deepspeed_settings, read_deepspeed
from frozen_fast.parallel.sharded import ShardedParallel, check_elementwise

if TYPE_CHECKING:
    from accelerate import Accelerator


class DeepSpeedParallel(ShardedParallel):
    """Parallel under DeepSpeed's ZeRO."""

    accelerate_types = ("DEEPSPEED",)

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator, config, precision)
        plugin: Any = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        self._stage: int = zero["stage"]
        offloaded = zero.keys() & {"offload_optimizer", "offload_param"}
        self.strategy = f"zero{self._stage}" + ("+offload" if offloaded else "")
        self._last_pass = True

    @classmethod
    def accelerator_for(cls, config: ExperimentConfig, cpu: bool, precision: str) -> Accelerator:
        """Accelerate's object with DeepSpeed's configuration completed from the experiment.

        Raises:
            UserError: DeepSpeed is not installed, or the launch contradicts the experiment.
        """
        check_elementwise(config, "ZeRO")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        given, where = read_deepspeed(os.environ)
        settings = deepspeed_settings(given, where, config, world_size=world_size, precision=precision)
        if settings["zero_optimization"]["stage"] == 3:
            _check_stage_3(config)
        if find_spec("deepspeed") is None:
            raise UserError(f"{where}: got DeepSpeed, which is not installed (pip install 'frozen-fast[deepspeed]')")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with _device_choice(cpu):
            return _accelerator(settings, cpu)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hand model and optimizer to DeepSpeed's engine."""
        self.keep_hollow(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._trained = {
            names[id(parameter)]: index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        super().prepare(model, optimizer)
        engine: Any = self._wrapped
        self._engine: Any = engine
        self._zero: Any = engine.optimizer
        # DeepSpeed links state to parameters after its first group's step, before the other groups have any.
        self._allocate_state([0.0] * len(self._partitions()))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The bare optimizer, which steps on the flat partitions."""
        return self._zero.optimizer

    def forward(self, *inputs: Any) -> Any:
        """The engine's forward pass under this run's autocast."""
        self._engine.set_gradient_accumulation_boundary(self._last_pass)
        return self._engine(*inputs)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """One forward and backward pass of an optimizer step."""
        self._last_pass = last
        yield

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to the parameters', exchanged as the stage does it."""
        self._engine.backward(loss, scale_wrt_gas=False)  # the step divides by the number of passes itself

    def update(self, gradient_clip_norm: float) -> Tensor | None:
        """DeepSpeed's step: clips at gradient_clipping of its configuration, which is the same number."""
        assert gradient_clip_norm == self._engine.gradient_clipping(), "the configuration was made from the experiment"
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.device) if gradient_clip_norm else None

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group and forget DeepSpeed's own handle on it."""
        super().close(failed=failed)
        if not failed:
            from deepspeed.comm import comm

            comm.cdb = None

    # Whole tensors

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other; stages 1 and 2 hold them all anyway."""
        for name, parameter in self.model.named_parameters():
            with self._gathered([parameter]):
                yield name, parameter.detach()

    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """See ShardedParallel."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if WEIGHT_AVERAGE in self._optimizer_kind.state_keys:
            for name, parameter in self._trained_parameters():
                yield name, safe_get_full_optimizer_state(parameter, WEIGHT_AVERAGE)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The bare model, which is whole under stages 1 and 2; under stage 3 a copy."""
        if self._stage < 3 and WEIGHT_AVERAGE not in self._optimizer_kind.state_keys:
            yield self.model
        else:
            with super().whole_model() as whole:
                yield whole

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state whole, by parameter name, on the CPU; a collective, empty but on rank 0.

        Before the first step it is zero, as an optimizer makes it.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.optimizer.state[flat] for flat in self._partitions()]
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._trained_parameters():
            tensors = {key: safe_get_full_optimizer_state(parameter, key) for key in self._optimizer_kind.state_keys}
            if self.is_main:
                step = states[self._flat_index(name, parameter)]["step"]
                gathered[name] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
                gathered[name]["step"] = torch.as_tensor(step).detach().float().cpu().clone()
        return gathered

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Put back what optimizer_state() gave, under this or another strategy.

        Raises:
            UserError: it belongs to another model, or parameters of one group were not stepped equally often.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        trained = dict(self._trained_parameters())
        check_optimizer_state(state, {name: _whole_shape(parameter) for name, parameter in trained.items()})
        self._allocate_state(self._steps(state, trained))
        for name, tensors in state.items():
            for key in self._optimizer_kind.state_keys:
                if key not in tensors:  # an average that the earlier run did not keep
                    continue
                whole = tensors[key].to(self.device, torch.float32)
                safe_set_full_optimizer_state(trained[name], whole, key)

    @contextlib.contextmanager
    def edit_parameter(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Give a parameter's whole weight and optimizer state for editing in place; every rank makes the same edit."""
        from deepspeed.utils import (
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        parameter = dict(self.model.named_parameters())[name]
        keys = self._optimizer_kind.state_keys if name in self._trained else ()
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        with torch.no_grad(), self._gathered([parameter], modifier_rank=0):
            yield state
            whole = parameter.detach().clone()
        if name in self._trained:
            safe_set_full_fp32_param(parameter, whole)
        for key, tensor in state.items():
            safe_set_full_optimizer_state(parameter, tensor, key)

    def weights_are_finite(self) -> bool:
        """Whether no rank's part of the weights holds NaN or infinity (waits for the device)."""
        return self.all_ranks(all(bool(flat.detach().isfinite().all()) for flat in self._partitions()))

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor per parameter group (stage 3: per subgroup of one)."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _flat_index(self, name: str, parameter: nn.Parameter) -> int:
        """Which of _partitions() a parameter lies in."""
        if self._stage < 3:
            return self._trained[name]
        return self._zero.grad_position[self._zero.get_param_id(parameter)][0]

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if name in self._trained)

    def _steps(self, state: dict[str, dict[str, Tensor]], trained: dict[str, nn.Parameter]) -> list[float]:
        """Steps done, for each of _partitions(): one number, since a flat tensor is stepped as a whole."""
        found: list[set[float]] = [set() for _ in self._partitions()]
        for name, tensors in state.items():
            found[self._flat_index(name, trained[name])].add(float(tensors["step"]))
        uneven = next((steps for steps in found if len(steps) > 1), None)
        if uneven:
            raise UserError(
                f"checkpoint: got parameters of one group that were stepped {sorted(uneven)} times; allowed under "
                "ZeRO: equally often (resume with ddp or fsdp2)"
            )
        return [max(steps, default=0.0) for steps in found]

    def _allocate_state(self, steps: list[float]) -> None:
        """Make the optimizer's state as its first step would, and let DeepSpeed find it by parameter."""
        group = self.optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        for flat, step in zip(self._partitions(), steps, strict=True):
            device = flat.device if on_device else torch.device("cpu")
            state: dict[str, Tensor] = {"step": torch.tensor(step, dtype=torch.float32, device=device)}
            for key in self._optimizer_kind.state_keys:
                copies = key in self._optimizer_kind.weight_copies
                state[key] = flat.detach().clone() if copies else torch.zeros_like(flat)
            self.optimizer.state[flat] = state
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gathered(
        self, parameters: list[nn.Parameter], modifier_rank: int | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Parameters whole inside; with a modifier_rank, that rank's edit is kept."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def _accelerator(settings: dict[str, Any], cpu: bool) -> Accelerator:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations import unset_hf_deepspeed_config

    expected, found = "cpu" if cpu else "cuda", get_accelerator().device_name()
    if cpu:
        _leave_ops_uncompiled()
    if found != expected:
        raise UserError(
            f"DS_ACCELERATOR: DeepSpeed computes on {found!r}, but training.device makes it {expected!r}; "
            f"allowed: DS_ACCELERATOR={expected}, or nothing"
        )
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except ValueError as error:  # such as keys both in the accelerate config and in the JSON file that it names
        raise UserError(f"accelerate config, deepspeed_config: {' '.join(str(error).split())}") from error
    plugin.hf_ds_config = HfDeepSpeedConfig({**settings, "steps_per_print": float("inf")})
    plugin.deepspeed_config = plugin.hf_ds_config.config
    # Without gloo each process would believe itself alone on a machine without GPUs.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    # Accelerate tells transformers of ZeRO-3, which would then cut a pretrained text tower while it is being loaded.
    plugin.dschf = None
    unset_hf_deepspeed_config()
    return accelerator


def _leave_ops_uncompiled() -> None:
    """On a CPU DeepSpeed would compile a shared-memory reduction for a minute at its first start; gloo does as well."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    vars(deepspeed.ops)["__compatible_ops__"] = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)


@contextlib.contextmanager
def _device_choice(cpu: bool) -> Iterator[None]:
    """DeepSpeed and Accelerate take the CPU from these variables only: Accelerator(cpu=True) drops DeepSpeed."""
    if not cpu:
        yield
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ACCELERATE_TORCH_DEVICE"]
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def _check_stage_3(config: ExperimentConfig) -> None:
    """Refuse what reads parameters where stage 3 has not gathered them."""
    refused = {
        "training.compile": config.training.compile,
        "model.video.skip_time_attention_at_one_frame": config.model.video.skip_time_attention_at_one_frame,
    }
    for key, asked in refused.items():
        if asked:
            raise UserError(f"{key}: got true with ZeRO stage 3; allowed: false, or zero1, zero2, fsdp2, ddp")


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
