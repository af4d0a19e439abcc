"""DeepSpeed ZeRO stages 1, 2 and 3 behind Parallel.

DeepSpeed's engine wraps the model, exchanges gradients while they are computed, clips them and steps. It shards a
second fp32 copy of the weights and the optimizer's state over the ranks, as one flat tensor per parameter group ("flat
partition"). Stage 3 shards the model's own weights as well. bf16 is DeepSpeed's torch_autocast over fp32 weights, so
that training.precision has the same meaning as under the other strategies. DeepSpeed's checkpoint format is not used:
whole tensors are gathered and loaded by name, on any number of ranks.
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
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.deepspeed_state import DeepSpeedState
from frozen_fast.parallel.launch_settings import deepspeed_settings, read_deepspeed
from frozen_fast.parallel.sharded_state import check_elementwise, hollow_copy

if TYPE_CHECKING:
    from accelerate import Accelerator


class DeepSpeedParallel(Parallel):
    """Parallel under DeepSpeed's ZeRO."""

    accelerate_types = ("DEEPSPEED",)

    def __init__(self, accelerator: Accelerator, config: ExperimentConfig, precision: tuple[str, str]) -> None:
        super().__init__(accelerator, config, precision)
        plugin: Any = accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        self._stage: int = zero["stage"]
        offloaded = zero.keys() & {"offload_optimizer", "offload_param"}
        self.strategy = f"zero{self._stage}" + ("+offload" if offloaded else "")
        self.holds_whole_weights = self._stage < 3 and not offloaded
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
        """Wrap model and optimizer in DeepSpeed's engine."""
        hollow = hollow_copy(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = {
            names[id(parameter)]: index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._model = model
        self._wrapped, self._optimizer = self.accelerator.prepare(model, optimizer)
        self._engine: Any = self._wrapped
        self.state = DeepSpeedState(
            model,
            self._engine.optimizer,
            self._optimizer_kind,
            stage=self._stage,
            trained=trained,
            hollow=hollow,
            ranks=self,
            device=self.device,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The bare optimizer, which steps on the flat partitions."""
        return self.state.optimizer

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

    def update(self, gradient_clip_norm: float, *, skip_non_finite: bool = False) -> Tensor:
        """DeepSpeed's step: clips at gradient_clipping of its configuration, which is the same number.

        DeepSpeed never applies gradients whose norm is not finite, even without skip_non_finite.
        """
        assert gradient_clip_norm == self._engine.gradient_clipping(), "the configuration was made from the experiment"
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else float("inf")
        return torch.as_tensor(norm, device=self.device)

    def release(self) -> None:
        """Release model, optimizer and DeepSpeed's engine; prepare() may then be called with others."""
        self._engine = None
        super().release()

    def close(self, *, failed: bool = False) -> None:
        """Leave the process group, and clear DeepSpeed's reference to it."""
        super().close(failed=failed)
        if not failed:
            from deepspeed.comm import comm

            comm.cdb = None


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
    # Without gloo, each process would use a world size of 1 on a machine without GPUs.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    # Accelerate enables ZeRO-3 in transformers, which would then partition a pretrained text tower while loading it.
    plugin.dschf = None
    unset_hf_deepspeed_config()
    return accelerator


def _leave_ops_uncompiled() -> None:
    """On a CPU, DeepSpeed would compile a shared-memory reduction for a minute at its first start; gloo replaces it."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    vars(deepspeed.ops)["__compatible_ops__"] = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)


@contextlib.contextmanager
def _device_choice(cpu: bool) -> Iterator[None]:
    """Only these variables make DeepSpeed and Accelerate use the CPU: Accelerator(cpu=True) disables DeepSpeed."""
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
    """Refuse options that read parameters that stage 3 has not gathered."""
    refused = {
        "training.compile": config.training.compile,
        "model.video.skip_time_attention_at_one_frame": config.model.video.skip_time_attention_at_one_frame,
    }
    for key, asked in refused.items():
        if asked:
            raise UserError(f"{key}: got true with ZeRO stage 3; allowed: false, or zero1, zero2, fsdp2, ddp")
