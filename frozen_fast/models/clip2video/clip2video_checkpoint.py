"""Reads CLIP2Video's checkpoints (a frozen_fast folder or a released pytorch_model.bin.N) as plain data."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from frozen_fast.errors import UserError, reason
from frozen_fast.models.clip.clip_tokenizer import ClipTokenizer
from frozen_fast.models.clip.clip_towers import VOCABULARY, ClipSize
from frozen_fast.models.clip.clip_weights import WRAPPERS, clip_from_state, read_state
from frozen_fast.models.model_folder import read_model_folder
from frozen_fast.models.released.frozen import count_layers, shape_of
from frozen_fast.models.text.tokenizer import TOKENIZER_FILE

CLIP_PREFIX = "clip."
KIND = "clip2video"
RELEASED_TOKENS = 32
RELEASED_SCALE = 100.0


class StoredClip2Video(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        state: weights by the model's names, fp32 for a released file.
        size: CLIP's sizes.
        settings: keyword arguments of Clip2Video: centers, temporal_depth, compatible_masks, max_scale.
        tokenizer: None if CLIP's vocabulary is not installed or is not the model's.
    """

    state: dict[str, Tensor]
    size: ClipSize
    settings: dict[str, Any]
    tokenizer: ClipTokenizer | None


def read_clip2video(path: Path, max_tokens: int = 0) -> StoredClip2Video:
    """Read a checkpoint: a folder or a released file.

    Args:
        path: folder or released file.
        max_tokens: captions are truncated to this many tokens; 0: the folder's value, or 32 for a released file.

    Raises:
        UserError: for a missing, damaged or unsupported checkpoint.
    """
    return _read_folder(path, max_tokens) if path.is_dir() else _read_released(path, max_tokens or RELEASED_TOKENS)


def _read_folder(path: Path, max_tokens: int) -> StoredClip2Video:
    state, config = read_model_folder(path, [KIND])
    try:
        size = ClipSize(**config["clip"])
        names = ("centers", "temporal_depth", "compatible_masks", "max_scale")
        settings = {name: config[name] for name in names}
        longest = max_tokens or int(config["max_tokens"])
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint: got {path}, whose config.json is incomplete ({reason(error)})") from error
    if (path / TOKENIZER_FILE).is_file():
        tokenizer = ClipTokenizer.load(path, longest)
        assert isinstance(tokenizer, ClipTokenizer)
        return StoredClip2Video(state, size, settings, tokenizer)
    return StoredClip2Video(state, size, settings, clip_tokenizer_for(size, longest))


def _read_released(path: Path, max_tokens: int) -> StoredClip2Video:
    """Read a flat state dict with CLIP under `clip.`; the temporal parts have CLIP's text width."""
    state = {}
    for name, value in read_state(path).items():
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
        state[name] = value
    inside = {name[len(CLIP_PREFIX) :]: value for name, value in state.items() if name.startswith(CLIP_PREFIX)}
    if not inside or "weight_center" not in state:
        raise UserError(f"checkpoint: got {path}; allowed: a released CLIP2Video (with clip.* and weight_center)")
    clip = clip_from_state(inside, str(path))
    own = {name: value.float() for name, value in state.items() if not name.startswith(CLIP_PREFIX)}
    own.update({f"{CLIP_PREFIX}{name}": value for name, value in clip.state.items()})
    settings = {
        "centers": shape_of(own, "weight_center")[0],
        "temporal_depth": count_layers(own, "transformerClip.resblocks."),
        "compatible_masks": False,
        "max_scale": max(RELEASED_SCALE, math.exp(float(clip.state["logit_scale"].max()))),
    }
    return StoredClip2Video(own, clip.size, settings, clip_tokenizer_for(clip.size, max_tokens))


def clip_tokenizer_for(size: ClipSize, max_tokens: int) -> ClipTokenizer | None:
    """Return CLIP's tokenizer if the extra clip is installed and the model has CLIP's vocabulary, otherwise None."""
    installed = find_spec("open_clip") is not None and find_spec("ftfy") is not None
    return ClipTokenizer.build(max_tokens) if installed and size.vocabulary == VOCABULARY else None
