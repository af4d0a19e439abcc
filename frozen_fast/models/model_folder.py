"""Reads and writes frozen_fast checkpoint folders with the model's kind in config.json, as plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from frozen_fast.common.files import write_json
from frozen_fast.errors import UserError, reason
from frozen_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, refuse_damage
from frozen_fast.models.text.tokenizer import Tokenizer

FORMAT = "frozen_fast.model"
FORMAT_VERSION = 1


def write_model_folder(
    folder: Path, kind: str, state: dict[str, Tensor], architecture: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Write model.safetensors, config.json and tokenizer files; creates the folder if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": kind, **architecture}
    write_json(folder / CONFIG_FILE, config)
    if tokenizer is not None:
        tokenizer.save(folder)


def read_model_folder(
    folder: Path, kinds: Collection[str], needs: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder of write_model_folder.

    Args:
        folder: the checkpoint.
        kinds: allowed kinds of model.
        needs: keys that config.json must contain.

    Returns:
        (state, config.json's content).

    Raises:
        UserError: a missing, damaged or unsupported folder, or one of another kind.
    """
    refuse_damage(folder)
    config = _config(folder)
    found = {key: config.get(key) for key in ("format", "format_version", "kind")}
    written_here = (found["format"], found["format_version"]) == (FORMAT, FORMAT_VERSION)
    if not written_here or found["kind"] not in kinds:
        allowed = f"{FORMAT} version {FORMAT_VERSION}, kind {' or '.join(sorted(kinds))}"
        raise UserError(f"checkpoint: got {folder} of {found}; allowed: {allowed}")
    missing = sorted(set(needs) - set(config))
    if missing:
        raise UserError(f"checkpoint: got {folder / CONFIG_FILE}, which lacks {missing[0]}")
    try:
        return load_file(folder / WEIGHTS_FILE), config
    except (OSError, SafetensorError) as error:
        got = f"got {folder}, whose {WEIGHTS_FILE} cannot be read ({reason(error)})"
        raise UserError(f"checkpoint: {got}") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: got {folder}, whose {CONFIG_FILE} cannot be read ({reason(error)})") from error
    return config if isinstance(config, dict) else {}
