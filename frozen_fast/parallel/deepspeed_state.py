"""Whole weights and optimizer state under DeepSpeed's ZeRO, through DeepSpeed's functions for gathering them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError
from frozen_fast.optimizers import WEIGHT_AVERAGE, OptimizerKind
from frozen_fast.parallel.agreement import RankAgreement
from frozen_fast.parallel.model_state import check_optimizer_state
from frozen_fast.parallel.sharded_state import ShardedState


class DeepSpeedState(ShardedState):
    """ShardedState under ZeRO: the optimizer steps on flat partitions, one per parameter group."""

    def __init__(
        self,
        model: nn.Module,
        zero_optimizer: Any,
        kind: OptimizerKind,
        *,
        stage: int,
        trained: dict[str, int],
        hollow: nn.Module,
        ranks: RankAgreement,
        device: torch.device,
    ) -> None:
        """Create the optimizer's state, which DeepSpeed otherwise creates in the first step.

        Args:
            model: the bare model.
            zero_optimizer: DeepSpeed's wrapper of the optimizer.
            kind: the state that this optimizer keeps.
            stage: of ZeRO, 1 to 3.
            trained: names of the trained parameters, with the index of their group.
            hollow: hollow_copy() of the model.
            ranks: rank and world size.
            device: where the model runs.
        """
        super().__init__(model, zero_optimizer.optimizer, kind, hollow=hollow, ranks=ranks)
        self._zero = zero_optimizer
        self._stage = stage
        self._trained = trained
        self._device = device
        # DeepSpeed links state to parameters after its first group's step, before the other groups have any.
        self._allocate_state([0.0] * len(self._partitions()))

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter as a whole tensor; under stages 1 and 2 every rank holds them."""
        for name, parameter in self.model.named_parameters():
            with self._gathered([parameter]):
                yield name, parameter.detach()

    def whole_averages(self) -> Iterator[tuple[str, Tensor]]:
        """See ShardedState."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if WEIGHT_AVERAGE in self._kind.state_keys:
            for name, parameter in self._trained_parameters():
                yield name, safe_get_full_optimizer_state(parameter, WEIGHT_AVERAGE)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The unwrapped model under stages 1 and 2, a copy with whole weights under stage 3."""
        if self._stage < 3 and WEIGHT_AVERAGE not in self._kind.state_keys:
            yield self.model
        else:
            with super().whole_model() as whole:
                yield whole

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the whole optimizer state by parameter name, on the CPU; a collective, empty on ranks other than 0.

        Before the first step the state is zero.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.optimizer.state[flat] for flat in self._partitions()]
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._trained_parameters():
            tensors = {key: safe_get_full_optimizer_state(parameter, key) for key in self._kind.state_keys}
            if self._ranks.is_main:
                step = states[self._flat_index(name, parameter)]["step"]
                gathered[name] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
                gathered[name]["step"] = torch.as_tensor(step).detach().float().cpu().clone()
        return gathered

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the result of optimizer_state() of this or another strategy.

        Raises:
            UserError: it belongs to another model, or parameters of one group were not stepped equally often.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        trained = dict(self._trained_parameters())
        shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in trained.items()}
        check_optimizer_state(state, shapes)
        self._allocate_state(self._steps(state, trained))
        for name, tensors in state.items():
            for key in self._kind.state_keys:
                if key not in tensors:  # an average that the earlier run did not have
                    continue
                whole = tensors[key].to(self._device, torch.float32)
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
        keys = self._kind.state_keys if name in self._trained else ()
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
        return self._ranks.all_ranks(all(bool(flat.detach().isfinite().all()) for flat in self._partitions()))

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor per parameter group (stage 3: per subgroup of one)."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _flat_index(self, name: str, parameter: nn.Parameter) -> int:
        """Return the index in _partitions() of a parameter's partition."""
        if self._stage < 3:
            return self._trained[name]
        return self._zero.grad_position[self._zero.get_param_id(parameter)][0]

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if name in self._trained)

    def _steps(self, state: dict[str, dict[str, Tensor]], trained: dict[str, nn.Parameter]) -> list[float]:
        """Return the number of steps of each of _partitions(); all parameters of a flat tensor have the same number."""
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
        """Create the optimizer's state as the first step does, and link it to the parameters for DeepSpeed."""
        group = self.optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        for flat, step in zip(self._partitions(), steps, strict=True):
            device = flat.device if on_device else torch.device("cpu")
            state: dict[str, Tensor] = {"step": torch.tensor(step, dtype=torch.float32, device=device)}
            for key in self._kind.state_keys:
                copies = key in self._kind.weight_copies
                state[key] = flat.detach().clone() if copies else torch.zeros_like(flat)
            self.optimizer.state[flat] = state
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gathered(
        self, parameters: list[nn.Parameter], modifier_rank: int | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Gather whole parameters in this context; with a modifier_rank, that rank's edits are kept."""
        if self._stage < 3:
            return contextlib.nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
