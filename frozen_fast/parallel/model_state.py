"""The whole weights and optimizer state of a prepared model by name, for checkpoints, evaluation and the curriculum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError
from frozen_fast.optimizers import WEIGHT_AVERAGE, OptimizerKind


class ModelState:
    """Weights and optimizer state of strategies under which every rank holds whole tensors: one process, DDP.

    Subclasses gather and shard them under the sharding strategies. Names, shapes and values are the same under all.

    Attributes:
        model: the bare model.
        optimizer: the bare optimizer.
    """

    gathers_copies = False
    """Whether weights() and optimizer_state() return copies on the CPU, which later steps do not change."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kind: OptimizerKind) -> None:
        self.model = model
        self.optimizer = optimizer
        self._kind = kind

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """Provide a model with whole weights for evaluation; entering is a collective, calling the model is not.

        With optimizer.weight_average_decay, its weights are the averages inside the context.
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

    def weights(self) -> dict[str, Tensor]:
        """Return every whole parameter and buffer by name. With sharding: a collective, empty on ranks other than 0."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the whole optimizer state by parameter name (exp_avg, exp_avg_sq, step); empty before the first step.

        With sharding: a collective, empty on ranks other than 0.
        """
        found = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters_with_state()}
        if self._kind.step_in_group:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in self.optimizer.param_groups:
                for name in (names[id(parameter)] for parameter in group["params"]):
                    if name in found:
                        found[name]["step"] = torch.as_tensor(group["step"])
        return found

    def load_optimizer_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the result of optimizer_state().

        Raises:
            UserError: it belongs to another model.
        """
        parameters = dict(self.model.named_parameters())
        check_optimizer_state(state, {name: parameter.shape for name, parameter in parameters.items()})
        for name, tensors in state.items():
            parameter = parameters[name]
            on_device = {}
            for key, tensor in tensors.items():
                whole = key != "step" or self.steps_on_device()
                on_device[key] = tensor.to(parameter.device if whole else "cpu", copy=True)
            if self._kind.step_in_group:
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

    def parameters_with_state(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer has stepped, by name."""
        state = self.optimizer.state
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter in state]

    def steps_on_device(self) -> bool:
        """Return whether the optimizer counts its steps on the device, as fused and capturable AdamW do."""
        group = self.optimizer.param_groups[0]
        return bool(group.get("fused") or group.get("capturable"))


def check_optimizer_state(state: dict[str, dict[str, Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Check that a checkpoint's optimizer state belongs to this model.

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
