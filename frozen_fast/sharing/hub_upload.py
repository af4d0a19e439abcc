"""Writes a Hub folder from a checkpoint and uploads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.errors import UserError, reason
from frozen_fast.models.pretrained import RUN_FILE, read_run
from frozen_fast.sharing.model_card import model_card

MODEL_FILES = ("config.json", "model.safetensors")
OPTIONAL_FILES = ("tokenizer.json", "tokenizer_config.json")
CARD = "README.md"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_hub_folder(checkpoint: Path, output: Path, *, name: str, licence: str) -> Path:
    """Copy the model's files, without the optimizer's state, and write the model card.

    Args:
        checkpoint: a frozen_fast checkpoint folder.
        output: a new or empty folder.
        name: ORG/NAME on the Hub.
        licence: of the weights.

    Raises:
        UserError: the checkpoint lacks a file, the name is not ORG/NAME, or the folder is not empty.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--repo: got {name!r}; allowed: ORG/NAME")
    missing = [file for file in MODEL_FILES if not (checkpoint / file).is_file()]
    if missing:
        raise UserError(
            f"--checkpoint: got {str(checkpoint)!r}, which lacks {missing[0]}; allowed: a frozen_fast folder "
            "(`frozen-fast convert-checkpoint` converts a released file)"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: got {str(output)!r}, which is not empty; allowed: a new or empty folder")
    card = model_card(checkpoint, name, licence)
    output.mkdir(parents=True, exist_ok=True)
    for file in (*MODEL_FILES, *OPTIONAL_FILES):
        if (checkpoint / file).is_file():
            shutil.copyfile(checkpoint / file, output / file)
    run = read_run(checkpoint)
    if run:
        write_json(output / RUN_FILE, shared_run(run))
    write_atomically(output / CARD, card)
    return output


def shared_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What embedding needs of a checkpoint's run, so that it gives the same vectors: settings only, no paths.

    Args:
        run: as read_run gives it.
    """
    config = run["config"]
    kept = {
        "model": ("kind", "expansion"),
        "data": ("sampling",),
        "training": ("precision",),
        "evaluation": ("frames", "stride_seconds", "max_windows", "resize"),
    }
    shared: dict[str, Any] = {
        section: {key: config[section][key] for key in keys if key in config.get(section, {})}
        for section, keys in kept.items()
    }
    stages = config.get("curriculum", {}).get("stages", [])
    shared["curriculum"] = {"stages": [{"frames": stage["frames"]} for stage in stages]}
    return {"config": shared, **{key: run[key] for key in ("stage", "learned_frames") if key in run}}


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to the Hub under the user's own login.

    Returns:
        URL of the commit.

    Raises:
        UserError: not logged in, offline, or refused.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a frozen_fast model"))
    except Exception as error:  # the Hub's and the network's errors share no base class
        raise UserError(
            f"--repo: {name} could not be uploaded to ({reason(error)}); allowed: a name that `hf auth login` gives "
            "rights to, with the network on"
        ) from None
