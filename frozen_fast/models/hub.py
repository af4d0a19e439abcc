"""Checkpoints by their name on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from frozen_fast.errors import UserError, reason
from frozen_fast.models.pretrained import checkpoint_of_run

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json")


def checkpoint_path(path: str | Path) -> Path:
    """The place of a checkpoint on this machine; "org/name" and "org/name@revision" come from the Hub or its cache.

    What exists on disk comes first; of a run folder, its best checkpoint or else its newest. With HF_HUB_OFFLINE=1
    only the cache is looked at.

    Raises:
        UserError: the name is neither here nor on the Hub.
    """
    local = Path(path).expanduser()
    found = _REPOSITORY.fullmatch(str(path))
    if local.exists() or found is None:
        return checkpoint_of_run(local)
    from huggingface_hub import snapshot_download

    name, revision = found.groups()
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # the Hub's errors, the network's and the cache's share no base class
        raise UserError(
            f"checkpoint: got {str(path)!r}, which is not here and not found on the Hub ({reason(error)}); allowed: a "
            "folder, a file, or ORG/NAME on the Hub (with HF_HUB_OFFLINE=1: in its cache)"
        ) from None
    return Path(folder)
