"""A frozen_fast checkpoint folder of an expert model: model.safetensors and config.json, read and written as data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from frozen_fast.common.files import write_json
from frozen_fast.errors import UserError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "frozen_fast.expert_model"
FORMAT_VERSION = 1


def write_expert_folder(folder: Path, kind: str, state: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Write weights and config.json; the folder is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": kind, **architecture}
    write_json(folder / CONFIG_FILE, config)


def read_expert_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what write_expert_folder wrote.

    Returns:
        (state, config: "kind", "sizes", "variant").

    Raises:
        UserError: a missing, damaged or foreign folder.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint: got {folder}, which cannot be read ({error})") from error
    found = {key: config.get(key) for key in ("format", "format_version")} if isinstance(config, dict) else {}
    if found != {"format": FORMAT, "format_version": FORMAT_VERSION}:
        raise UserError(f"checkpoint: got {folder} of {found}; allowed: {FORMAT} version {FORMAT_VERSION}")
    missing = [key for key in ("kind", "sizes", "variant") if key not in config]
    if missing:
        raise UserError(f"checkpoint: got {folder / CONFIG_FILE}, which lacks {missing[0]}")
    return state, config
