"""Checkpoint files of a dual encoder: a frozen_fast folder or a released file, read into plain data and back.

This file knows file formats, not the model: DualEncoder describes itself as data (its architecture) and builds itself
from a StoredModel.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frozen_fast.common.checksums import MANIFEST, find_damage
from frozen_fast.common.files import write_json
from frozen_fast.errors import UserError, some
from frozen_fast.models.learned_scale import LearnedScale
from frozen_fast.models.released.frozen import read_released, shape_of, text_config, video_size
from frozen_fast.models.text.tokenizer import TOKENIZER_FILE, Tokenizer
from frozen_fast.models.text.tower import TextTower, config_from_dict, load_tokenizer, model_from_config
from frozen_fast.models.video.space_time import VideoSize

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "frozen_fast.dual_encoder"
FORMAT_VERSION = 1
DEFAULT_MAX_TOKENS = 77
TEMPORAL = "video_model.temporal_embed"


def write_model(
    folder: Path, state: dict[str, Tensor], architecture: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Write model.safetensors, config.json and tokenizer files.

    Args:
        folder: made if missing.
        state: every weight, under the model's names.
        architecture: what the model needs to be built again, as JSON-able data.
        tokenizer: written beside them, if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, **architecture})
    if tokenizer is not None:
        tokenizer.save(folder)


def read_model(path: Path, tokenizer: str | None = None, max_tokens: int | None = None) -> StoredModel:
    """Read a checkpoint of either kind.

    Args:
        path: checkpoint folder, run folder (its best checkpoint, else its newest) or released file.
        tokenizer: name or folder; None: the checkpoint's own.
        max_tokens: captions are cut to this many tokens; None: the checkpoint's value (a released file: 77, or as many
            as its text tower takes).

    Raises:
        UserError: for a missing, damaged or foreign checkpoint.
    """
    path = checkpoint_of_run(path)
    read = _read_folder if path.is_dir() else _read_released
    return read(path, tokenizer, max_tokens)


def checkpoint_of_run(path: Path) -> Path:
    """The best checkpoint of a run folder, the newest where none is kept as the best; any other path as it is.

    Raises:
        UserError: the run folder holds no checkpoint yet.
    """
    folder = path / "checkpoints"
    if not folder.is_dir() or (path / CONFIG_FILE).exists():
        return path
    found = [folder / "best"] if (folder / "best").is_dir() else sorted(folder.glob("step_*"))
    if not found:
        raise UserError(f"checkpoint: got {str(path)!r}, a run folder without checkpoints; allowed: one with some")
    return found[-1]


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a whole state dict.

    Raises:
        UserError: naming missing, unknown or misshapen weights.
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


class StoredModel:
    """What a checkpoint gives, of either kind."""

    def __init__(
        self,
        state: dict[str, Tensor],
        size: VideoSize,
        video_options: dict[str, Any],
        text: TextTower,
        options: dict[str, Any],
        learned_frames: int,
    ) -> None:
        self.state = state
        self.size = size
        self.video_options = video_options
        self.text = text
        self.options = options
        self.learned_frames = learned_frames
        shape = shape_of(state, TEMPORAL)
        if len(shape) != 3 or shape[0] != 1 or not 1 <= learned_frames <= shape[1]:
            raise UserError(f"checkpoint: {TEMPORAL} has shape {list(shape)} and {learned_frames} learned frames")


def _read_folder(path: Path, tokenizer_name: str | None, max_tokens: int | None) -> StoredModel:
    """A frozen_fast checkpoint folder; a run's checkpoint has checksums, which its model's files must match."""
    if (path / MANIFEST).is_file():
        damage = find_damage(path, [file.name for file in path.iterdir() if file.name != "training_state.pt"])
        if damage is not None:
            raise UserError(f"checkpoint: got {path}, which is damaged: {damage}; allowed: files as they were written")
    config = _read_config(path / CONFIG_FILE)
    try:
        state = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint: got {path}, whose {WEIGHTS_FILE} cannot be read ({error})") from error
    try:
        video, text = dict(config["video"]), config["text"]
        size = VideoSize(**video.pop("size"))
        video.pop("max_frames")
        tokenizer = _folder_tokenizer(path, tokenizer_name, max_tokens or text["max_tokens"])
        tower = TextTower(model_from_config(config_from_dict(text["config"])), tokenizer, text["pooling"])
        options = {key: config[key] for key in ("embedding_width", "text_activation", "mean", "std")}
        if "loss_scale" in config:
            options["loss_scale"] = LearnedScale.from_settings(config["loss_scale"])
        return StoredModel(state, size, video, tower, options, int(config["learned_frames"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint: got {path / CONFIG_FILE}, which is incomplete ({error})") from error


def _folder_tokenizer(path: Path, name: str | None, max_tokens: int) -> Tokenizer | None:
    if name is not None:
        return load_tokenizer(name, max_tokens)
    return Tokenizer.load(path, max_tokens) if (path / TOKENIZER_FILE).is_file() else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: got {path.parent}, whose {CONFIG_FILE} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"checkpoint: got {path.parent}; allowed: a folder that frozen_fast wrote, or a released file")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint: got {path.parent} of format version {config.get('format_version')}; allowed: {FORMAT_VERSION}"
        )
    return config


def _read_released(path: Path, tokenizer_name: str | None, max_tokens: int | None) -> StoredModel:
    """A released .pth or .pth.tar file: DistilBERT or BERT, ReLU before the text projection."""
    state = read_released(path)
    config = text_config(state)
    longest = max_tokens or min(DEFAULT_MAX_TOKENS, config.max_position_embeddings)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name, longest)
    tower = TextTower(model_from_config(config), tokenizer, "auto")
    options = {"embedding_width": shape_of(state, "vid_proj.0.weight")[0], "text_activation": "relu"}
    return StoredModel(state, video_size(state), {}, tower, options, shape_of(state, TEMPORAL)[1])
