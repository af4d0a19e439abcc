"""Checkpoints on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from frozen_fast.errors import UserError, reason
from frozen_fast.models.pretrained import checkpoint_of_run

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json")


def checkpoint_path(path: str | Path) -> Path:
    """Return a checkpoint's local path; "org/name" and "org/name@revision" are read from the Hub or its cache.

    A path that exists on disk takes precedence. For a run folder this is its best checkpoint, or its newest if there is
    no best one. With HF_HUB_OFFLINE=1 only the cache is used.

    Raises:
        UserError: the name is neither a path on this machine nor on the Hub.
    """
    local = Path(path).expanduser()
    found = _REPOSITORY.fullmatch(str(path))
    if local.exists() or found is None:
        return checkpoint_of_run(local)
    from huggingface_hub import snapshot_download

    name, revision = found.groups()
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # errors of the Hub, the network and the cache share no base class
        raise UserError(
            f"checkpoint: got {str(path)!r}, which is neither a path on this machine nor "
            f"found on the Hub ({reason(error)}); allowed: a folder, a file, or ORG/NAME on the Hub "
            "(with HF_HUB_OFFLINE=1: in its cache)"
        ) from None
    return Path(folder)
