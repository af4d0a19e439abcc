"""Loads a model of any kind from its checkpoint."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from frozen_fast.config.extensions import models
from frozen_fast.errors import UserError, reason, unknown_name
from frozen_fast.models.hub import checkpoint_path
from frozen_fast.models.pretrained import checkpoints_below
from frozen_fast.models.retrieval_model import RetrievalModel

CONFIG_FILE = "config.json"
KIND_OF_FORMAT = {"frozen_fast.dual_encoder": "frozen"}
"""Kind of folders whose config.json has no kind."""


def load_model(path: str | Path, kind: str | None = None, **options: Any) -> RetrievalModel:
    """Load a model, in eval mode.

    Args:
        path: a checkpoint folder of frozen_fast, a run folder (its best checkpoint, otherwise its newest), a file
            released by another project, or ORG/NAME on the Hub.
        kind: a name in frozen_fast.config.extensions.models; None: the kind in the folder's config.json. Required for a
            released file.
        options: keyword arguments of the model's from_pretrained.

    Raises:
        UserError: the kind is missing, unknown or not the folder's; an option is unknown; or the checkpoint is damaged.
    """
    path = checkpoint_path(path)
    kind = kind_of_checkpoint(path, kind)
    build = models.load(kind, "kind").from_pretrained
    parameters = list(inspect.signature(build).parameters.values())[1:]
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        names = [one.name for one in parameters]
        for name in options:
            if name not in names:
                raise unknown_name("load_model option", name, names)
    return build(path, **options)


def kind_of_checkpoint(path: Path, kind: str | None = None) -> str:
    """Return the kind of a checkpoint's model, a name in frozen_fast.config.extensions.models.

    Args:
        path: a frozen_fast folder or a released file.
        kind: the caller's choice; None: the kind in the folder's config.json.

    Raises:
        UserError: the kind is unknown or not the folder's, or is None for a file.
    """
    if kind is not None:
        models.check(kind, "kind")
    if path.is_dir():
        stored = stored_kind(path)
        if kind not in (None, stored):
            raise UserError(f"kind: got {kind!r} for {path}, which contains a {stored}; allowed: {stored}, or none")
        return stored
    if kind is None:
        raise UserError(f"kind: got none for the file {path}; allowed: {', '.join(models.names())}")
    return kind


def stored_kind(folder: Path) -> str:
    """Return the kind in a checkpoint folder's config.json.

    Raises:
        UserError: there is none.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = checkpoints_below(folder)
        raise UserError(
            f"checkpoint: got {folder}, whose {CONFIG_FILE} cannot be read ({reason(error)}){found}"
        ) from error
    kind = config.get("kind", KIND_OF_FORMAT.get(str(config.get("format")))) if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"checkpoint: got {folder}; allowed: a folder that frozen_fast wrote, or a released file")
    return kind
