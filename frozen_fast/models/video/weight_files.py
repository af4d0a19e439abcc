"""Initial weights of a video tower from a local file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError, reason, some

FIELD = "model.video.weights"


def read_state_dict(weights: str, allowed: str) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a torch file, wrapped or not, without a data-parallel prefix.

    Args:
        weights: the file.
        allowed: what the key may hold, for messages.

    Raises:
        UserError: naming model.video.weights, for what cannot be read.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"{FIELD}: got {weights!r}; allowed: {allowed}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything at all
        raise UserError(f"{FIELD}: got {weights!r}, which cannot be read ({reason(error)})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{FIELD}: got {weights!r}, which holds no state dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weight_file(model: nn.Module, weights: str, allowed: str, is_head: Callable[[str], bool]) -> None:
    """Copy a local file's weights into a model; those of a classifier are left out.

    Args:
        model: changed in place.
        weights: the file.
        allowed: what the key may hold, for messages.
        is_head: whether a weight of the file is part of the classifier, which the model has not.

    Raises:
        UserError: naming model.video.weights, for a missing weight, an unknown one, or one of another shape.
    """
    state = {name: value for name, value in read_state_dict(weights, allowed).items() if not is_head(name)}
    own = model.state_dict()
    for label, names in (("lacks", set(own) - set(state)), ("has unknown", set(state) - set(own))):
        if names:
            raise UserError(f"{FIELD}: got {weights!r}, which {label} {some(names)}; allowed: {allowed}")
    for name, value in own.items():
        got = list(state[name].shape)
        if got != list(value.shape):
            raise UserError(f"{FIELD}: got {weights!r}, whose {name} has shape {got}; allowed: {list(value.shape)}")
    model.load_state_dict(state)
