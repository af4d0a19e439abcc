"""Initial weights of a video tower from a local file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError, reason, some

FIELD = "model.video.weights"


def read_state_dict(weights: str, allowed: str) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors or torch file, without wrapping keys and the data-parallel prefix.

    Args:
        weights: the file.
        allowed: the values that the key may have, for messages.

    Raises:
        UserError: naming model.video.weights, if the file cannot be read.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"{FIELD}: got {weights!r}; allowed: {allowed}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{FIELD}: got {weights!r}, which cannot be read ({reason(error)})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{FIELD}: got {weights!r}, which contains no state dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weight_file(model: nn.Module, weights: str, allowed: str, is_head: Callable[[str], bool]) -> None:
    """Copy a local file's weights into a model, without those of a classifier.

    Args:
        model: changed in place.
        weights: the file.
        allowed: the values that the key may have, for messages.
        is_head: returns whether a weight of the file is part of the classifier, which the model does not have.

    Raises:
        UserError: naming model.video.weights, if a weight is missing, unknown or has another shape.
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
