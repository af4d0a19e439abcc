"""Reading the tensors of a TorchScript archive (torch.jit.save) without loading its code.

OpenAI publishes CLIP in this form. The archive pickles the module tree: every submodule is an object whose state
contains its tensors, flags and children by name. Stub classes that only store this state replace the archive's classes,
so that no code is executed.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError, reason
from frozen_fast.models.released.torch_pickle import LazyTensor, RestrictedUnpickler, ZipArchive

SCRIPT_PREFIX = "__torch__"
"""Module prefix of the classes of a model in TorchScript."""


class ScriptModule:
    """Stub for a scripted module: its state by name."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        """Initialise without state."""
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Store a dictionary; other values are not the state of a module."""
        self.state = state if isinstance(state, dict) else {}


class _ScriptUnpickler(RestrictedUnpickler):
    """An unpickler that also creates stubs for scripted modules."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name; the model's classes become ScriptModule."""
        if module.split(".", 1)[0] == SCRIPT_PREFIX:
            return ScriptModule
        return super().find_class(module, name)


class _ScriptArchive(ZipArchive):
    """A zip of data.pkl, one record per storage, code and constants; the last two are not read."""

    def unpickle(self, data: bytes) -> Any:
        return _ScriptUnpickler(io.BytesIO(data), self).load()


def is_jit_archive(path: Path) -> bool:
    """Return whether a file is a zip with the constants of a TorchScript archive."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def load_jit_archive(path: Path) -> dict[str, LazyTensor]:
    """Return a TorchScript archive's tensors by their state dict names; they are read from disk on access.

    Raises:
        UserError: the file is damaged or contains no module.
    """
    try:
        root = _ScriptArchive(path, scripted=True).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"checkpoint: got {path}, which is not a readable TorchScript file ({reason(error)})"
        ) from error
    if not isinstance(root, ScriptModule):
        raise UserError(f"checkpoint: got {path}, a TorchScript file that contains no module")
    return _tensors_of(root, "", ())


def _tensors_of(module: ScriptModule, prefix: str, above: tuple[int, ...]) -> dict[str, LazyTensor]:
    """Collect the tensors below a module; modules that contain themselves, as in a forged file, are not followed."""
    found: dict[str, LazyTensor] = {}
    for name, value in module.state.items():
        if isinstance(value, LazyTensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, ScriptModule) and id(value) not in above:
            found.update(_tensors_of(value, f"{prefix}{name}.", (*above, id(module), id(value))))
    return found
