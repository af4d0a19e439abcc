"""Reading the tensors of a TorchScript archive (torch.jit.save) without loading its code.

OpenAI publishes CLIP in this form. The archive pickles the module tree: every submodule is an object whose state holds
its tensors, flags and children by name. Its classes become stand-ins that only keep that state, so nothing is run.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError, reason
from frozen_fast.models.released.torch_pickle import LazyTensor, RestrictedUnpickler, ZipArchive

SCRIPT_PREFIX = "__torch__"
"""Where TorchScript puts the classes of a model's own modules."""


class ScriptModule:
    """Stand-in for a scripted module: its state by name."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        """Start without state."""
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep a dictionary; anything else is no module's state."""
        self.state = state if isinstance(state, dict) else {}


class _ScriptUnpickler(RestrictedUnpickler):
    """Also makes stand-ins for scripted modules."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; a class of the model's own becomes ScriptModule."""
        if module.split(".", 1)[0] == SCRIPT_PREFIX:
            return ScriptModule
        return super().find_class(module, name)


class _ScriptArchive(ZipArchive):
    """A zip of data.pkl, one record per storage, code and constants; the last two are not read."""

    def unpickle(self, data: bytes) -> Any:
        return _ScriptUnpickler(io.BytesIO(data), self).load()


def is_jit_archive(path: Path) -> bool:
    """Whether a file is a zip with a TorchScript archive's constants."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def load_jit_archive(path: Path) -> dict[str, LazyTensor]:
    """Read a TorchScript archive's tensors under their state dict names; they stay on disk until read.

    Raises:
        UserError: where the file is damaged or holds no module.
    """
    try:
        root = _ScriptArchive(path, scripted=True).load()
    except Exception as error:  # a damaged pickle raises anything at all
        raise UserError(f"checkpoint: got {path}, which is no readable TorchScript file ({reason(error)})") from error
    if not isinstance(root, ScriptModule):
        raise UserError(f"checkpoint: got {path}, a TorchScript file that holds no module")
    return _tensors_of(root, "", ())


def _tensors_of(module: ScriptModule, prefix: str, above: tuple[int, ...]) -> dict[str, LazyTensor]:
    """The tensors below a module; a module inside itself, which only a forged file has, is not followed."""
    found: dict[str, LazyTensor] = {}
    for name, value in module.state.items():
        if isinstance(value, LazyTensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, ScriptModule) and id(value) not in above:
            found.update(_tensors_of(value, f"{prefix}{name}.", (*above, id(module), id(value))))
    return found
