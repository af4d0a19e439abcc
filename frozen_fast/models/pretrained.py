"""Reads and writes checkpoints of a dual encoder (a frozen_fast folder or a released file) as plain data.

This module handles file formats only. DualEncoder describes its architecture as data and builds itself from a
StoredModel.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frozen_fast.common.checksums import MANIFEST, find_damage
from frozen_fast.common.files import write_json
from frozen_fast.config.model_defaults import TEXT_TOWER, VIDEO_TOWER
from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.released.frozen import read_released, shape_of, text_config, video_size
from frozen_fast.models.text.tokenizer import TOKENIZER_FILE, Tokenizer
from frozen_fast.models.text.transformers_tower import default_max_tokens, load_tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
RUN_FILE = "run.json"
"""Keys of state.json that a shared model keeps: the evaluation settings of its run."""

FORMAT = "frozen_fast.dual_encoder"
FORMAT_VERSION = 1
ARCHITECTURE_KEYS = ("embedding_width", "text_activation", "learned_frames", "mean", "std")
UNCASED_VOCABULARY = 30522
"""Vocabulary size of bert-base-uncased and distilbert-base-uncased."""


def write_model(
    folder: Path, state: dict[str, Tensor], architecture: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Write model.safetensors, config.json and tokenizer files.

    Args:
        folder: created if missing.
        state: all weights, by the model's names.
        architecture: the model's architecture, as data that JSON can represent.
        tokenizer: also written if given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, **architecture})
    if tokenizer is not None:
        tokenizer.save(folder)


@dataclass
class StoredModel:
    """The content of a checkpoint.

    Attributes:
        state: weights by name.
        architecture: the result of DualEncoder.architecture(): "video" and "text" with the towers' names and data,
            embedding_width, text_activation, learned_frames; mean and std if the file has them.
        tokenizer: None: the checkpoint has none, and none was requested.
    """

    state: dict[str, Tensor]
    architecture: dict[str, Any]
    tokenizer: Tokenizer | None


def read_model(
    path: Path,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    *,
    video_heads: int | None = None,
    text_heads: int | None = None,
) -> StoredModel:
    """Read a checkpoint: a folder or a released file.

    Args:
        path: checkpoint folder, run folder (its best checkpoint, otherwise its newest) or released file.
        tokenizer: name or folder; None: the checkpoint's own.
        max_tokens: captions are truncated to this many tokens; None: the checkpoint's value (for a released file 77, or
            its text tower's maximum).
        video_heads: attention heads of a released file's video tower; None: width / 64.
        text_heads: attention heads of its text tower; None: width / 64.

    Raises:
        UserError: for a missing, damaged or unsupported checkpoint.
    """
    path = checkpoint_of_run(path)
    if path.is_dir():
        return _read_folder(path, tokenizer, max_tokens)
    return _read_released(path, tokenizer, max_tokens, video_heads, text_heads)


def own_tokenizer(path: Path, architecture: dict[str, Any]) -> str | None:
    """Return the name of the tokenizer of a checkpoint without tokenizer files, if it is known.

    Args:
        path: the checkpoint.
        architecture: StoredModel.architecture.

    Returns:
        None for a folder with a tokenizer, and for a text tower whose sizes do not identify it.
    """
    text = architecture["text"]
    if (checkpoint_of_run(path) / TOKENIZER_FILE).is_file():
        return None
    if text.get("name") is not None:
        return str(text["name"])
    config = text.get("config") or {}
    kind, vocabulary = config.get("model_type"), config.get("vocab_size")
    return f"{kind}-base-uncased" if kind in ("bert", "distilbert") and vocabulary == UNCASED_VOCABULARY else None


def checkpoint_of_run(path: Path) -> Path:
    """Return the best checkpoint of a run folder, or the newest if none is kept as the best; other paths unchanged.

    Raises:
        UserError: the run folder has no checkpoint yet.
    """
    folder = path / "checkpoints"
    if not folder.is_dir() or (path / CONFIG_FILE).exists():
        return path
    found = [folder / "best"] if (folder / "best").is_dir() else sorted(folder.glob("step_*"))
    if not found:
        raise UserError(
            f"checkpoint: got {str(path)!r}, a run folder without checkpoints; allowed: one with checkpoints"
        )
    return found[-1]


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's data on the run that wrote it, such as "config"; empty if it has none.

    Args:
        checkpoint: a run's checkpoint has state.json, a folder from the Hub run.json, a released file neither.

    Raises:
        UserError: the file exists but cannot be read.
    """
    for path in (checkpoint / STATE_FILE, checkpoint / RUN_FILE):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint: got {checkpoint}, whose {path.name} cannot be read ({error})") from None
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise UserError(f"checkpoint: got {checkpoint}, whose {path.name} lacks the run's config")
        return found
    return {}


def checkpoints_below(path: Path) -> str:
    """List the checkpoints in a folder that is not a checkpoint, for an error message; empty if there are none."""
    found = sorted(path.glob("step_*")) or sorted(path.glob("checkpoints/step_*"))
    return f"; it contains {some([str(one) for one in found])}" if found else ""


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a whole state dict.

    Raises:
        UserError: weights are missing, unknown or of another shape; the message names them.
    """
    own = model.state_dict()
    for label, names in (("lacks", set(own) - set(state)), ("has unknown", set(state) - set(own))):
        if names:
            raise UserError(f"checkpoint: got {path}, which {label} {some(names)}")
    for name, value in own.items():
        got = list(state[name].shape)
        if got != list(value.shape):
            raise UserError(f"checkpoint: got {path}, whose {name} has shape {got}; allowed: {list(value.shape)}")
    model.load_state_dict(state)


def refuse_damage(folder: Path) -> None:
    """Compare the model files of a run's checkpoint with their checksums; does nothing for folders without checksums.

    Raises:
        UserError: naming the first file that differs.
    """
    if (folder / MANIFEST).is_file():
        damage = find_damage(folder, [file.name for file in folder.iterdir() if file.name != "training_state.pt"])
        if damage is not None:
            raise UserError(f"checkpoint: got {folder}, which is damaged: {damage}; allowed: an undamaged checkpoint")


def _read_folder(path: Path, tokenizer_name: str | None, max_tokens: int | None) -> StoredModel:
    """Read a frozen_fast checkpoint folder; the model files of a run's checkpoint must match their checksums."""
    refuse_damage(path)
    config = _read_config(path / CONFIG_FILE)
    try:
        state = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint: got {path}, whose {WEIGHTS_FILE} cannot be read ({error})") from error
    try:
        architecture = {key: config[key] for key in ARCHITECTURE_KEYS}
        if "loss_scale" in config:
            architecture["loss_scale"] = config["loss_scale"]
        video = {"tower": VIDEO_TOWER, **config["video"]}  # older folders have no name of the tower
        text = {"tower": TEXT_TOWER, **config["text"]}
        video["max_frames"] = int(video["max_frames"])
        longest = max_tokens or int(text["max_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint: got {path / CONFIG_FILE}, which is incomplete ({error})") from error
    tokenizer = None
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name, longest)
    elif (path / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(path, longest)
    return StoredModel(state, {**architecture, "video": video, "text": text}, tokenizer)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        folder = f"{path.parent}, whose {CONFIG_FILE} cannot be read ({reason(error)})"
        raise UserError(f"checkpoint: got {folder}{checkpoints_below(path.parent)}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"checkpoint: got {path.parent}; allowed: a folder that frozen_fast wrote, or a released file")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint: got {path.parent} of format version {config.get('format_version')}; allowed: {FORMAT_VERSION}"
        )
    return config


def _read_released(
    path: Path, tokenizer_name: str | None, max_tokens: int | None, video_heads: int | None, text_heads: int | None
) -> StoredModel:
    """Read a released .pth or .pth.tar file: DistilBERT or BERT, with ReLU before the text projection."""
    state = read_released(path)
    config = text_config(state, text_heads)
    longest = max_tokens or default_max_tokens(config.max_position_embeddings)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name, longest)
    size = video_size(state, video_heads)
    frames = shape_of(state, "video_model.temporal_embed")
    if len(frames) != 3 or frames[0] != 1 or frames[1] < 1:
        raise UserError(f"checkpoint: video_model.temporal_embed has shape {list(frames)}; allowed: [1, T, D]")
    architecture = {
        "video": {"tower": VIDEO_TOWER, "size": asdict(size), "max_frames": frames[1]},
        "text": {"tower": TEXT_TOWER, "config": config.to_dict(), "pooling": "auto", "max_tokens": longest},
        "embedding_width": shape_of(state, "vid_proj.0.weight")[0],
        "text_activation": "relu",
        "learned_frames": frames[1],
    }
    return StoredModel(state, architecture, tokenizer)
