"""Saving a dual encoder, and loading one from a frozen_fast folder or a released file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frozen_fast.common.files import write_json
from frozen_fast.errors import UserError
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.released import read_released, shape_of, text_config, video_size
from frozen_fast.models.space_time import SpaceTimeTransformer, VideoSize
from frozen_fast.models.temporal import expand_temporal_embedding
from frozen_fast.models.text import TextTower, config_from_dict, load_tokenizer, model_from_config
from frozen_fast.models.tokenizer import TOKENIZER_FILE, Tokenizer
from frozen_fast.models.wording import some

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "frozen_fast.dual_encoder"
FORMAT_VERSION = 1
DEFAULT_MAX_TOKENS = 77
TEMPORAL = "video_model.temporal_embed"
DROPPED_TEXT_KEYS = ("dtype", "transformers_version", "id2label", "label2id", "architectures")
"""Keys of a transformers config that do not say how the encoder computes."""


def architecture(model: DualEncoder) -> dict[str, Any]:
    """What config.json holds: all that from_pretrained needs beside the weights and the tokenizer."""
    video, text = model.video_model, model.text_model
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "video": {
            "size": asdict(video.size),
            "max_frames": video.max_frames,
            "block": video.block,
            "skip_time_attention_at_one_frame": video.skip_time_attention_at_one_frame,
        },
        "text": {
            "config": _plain_text_config(text),
            "pooling": text.pooling,
            "max_tokens": text.tokenizer.max_tokens if text.tokenizer is not None else DEFAULT_MAX_TOKENS,
        },
        "embedding_width": model.embedding_width,
        "text_activation": model.text_activation,
        "learned_frames": model.learned_frames,
        "mean": list(model.mean),
        "std": list(model.std),
    }


def _plain_text_config(text: TextTower) -> dict[str, Any]:
    """The transformers config, without the paths and versions of the machine it was made on."""
    values = json.loads(text.config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in DROPPED_TEXT_KEYS}


def save_pretrained(model: DualEncoder, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write model.safetensors, config.json and tokenizer files.

    Args:
        model: the model.
        folder: made if missing.
        state: weights to write instead of the model's own (gathered from shards), under the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state is None else state
    contiguous = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, architecture(model))
    if model.text_model.tokenizer is not None:
        model.text_model.tokenizer.save(folder)


def from_pretrained(
    path: Path,
    num_frames: int | None = None,
    expansion: str = "zero",
    tokenizer: str | None = None,
    *,
    max_frames: int | None = None,
    max_tokens: int | None = None,
    video_options: dict[str, Any] | None = None,
) -> DualEncoder:
    """Load a checkpoint; DualEncoder.from_pretrained tells the first four arguments.

    Args:
        path: folder or released file.
        num_frames: rows of temporal embedding that count as learned; None: the checkpoint's.
        expansion: how more of them are made.
        tokenizer: None: the checkpoint's own.
        max_frames: rows of temporal_embed to allocate; None: num_frames. The rows above num_frames are 0,
            or, with num_frames None, what a run drew them as and has not used yet.
        max_tokens: captions are cut to so many tokens; None: as the checkpoint has it (a released file: 77, or as many
            as its text tower takes).
        video_options: keywords of SpaceTimeTransformer that replace the checkpoint's.
    """
    read = _read_folder if path.is_dir() else _read_released
    parts = read(path, tokenizer, max_tokens)
    learned = parts.learned_frames if num_frames is None else num_frames
    if learned < 1:
        raise UserError(f"num_frames: got {learned}; allowed: 1 or more")
    rows = max(learned, max_frames or learned)
    rows_1TD = parts.state[TEMPORAL]
    if num_frames is not None:
        rows_1TD = expand_temporal_embedding(rows_1TD[:, : parts.learned_frames], learned, expansion)
    parts.state[TEMPORAL] = expand_temporal_embedding(rows_1TD, rows, "zero")
    with torch.device("meta"):  # drawing weights that the file replaces would take seconds
        video = SpaceTimeTransformer(parts.size, rows, **{**parts.video_options, **(video_options or {})})
    model = DualEncoder(video.to_empty(device="cpu"), parts.text, learned_frames=learned, **parts.options)
    load_weights(model, parts.state, path)
    return model.eval()


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


class _Parts:
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


def _read_folder(path: Path, tokenizer_name: str | None, max_tokens: int | None) -> _Parts:
    """A frozen_fast checkpoint folder."""
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
        return _Parts(state, size, video, tower, options, int(config["learned_frames"]))
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


def _read_released(path: Path, tokenizer_name: str | None, max_tokens: int | None) -> _Parts:
    """A released .pth or .pth.tar file: DistilBERT or BERT, ReLU before the text projection."""
    state = read_released(path)
    config = text_config(state)
    longest = max_tokens or min(DEFAULT_MAX_TOKENS, config.max_position_embeddings)
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name, longest)
    tower = TextTower(model_from_config(config), tokenizer, "auto")
    options = {"embedding_width": shape_of(state, "vid_proj.0.weight")[0], "text_activation": "relu"}
    return _Parts(state, video_size(state), {}, tower, options, shape_of(state, TEMPORAL)[1])
