"""Reads the released checkpoints of Frozen in Time (.pth, .pth.tar, .safetensors) and determines their sizes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, DistilBertConfig, PreTrainedConfig

from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.errors import UserError, reason
from frozen_fast.models.released.torch_pickle import LazyTensor, load_torch_pickle, read_tensors

log = logging.getLogger(__name__)

PARALLEL_PREFIX = "module."
VIDEO_CLS = "video_model.cls_token"
"""A weight that all released files contain."""

HEAD_WIDTH = 64
"""Head width of all released architectures (ViT, DistilBERT, BERT), which is not in their files."""

RELEASED_WIDTH = 768
"""Width of both towers of every released file."""

IGNORED_KEYS = ("text_model.embeddings.position_ids",)
"""Counters that older transformers versions stored as weights."""


def read_released(path: Path) -> dict[str, Tensor]:
    """Read a released checkpoint's state dict, names without the data-parallel prefix.

    Args:
        path: a pickled .pth or .pth.tar, or the same weights under the same names as .safetensors.

    Raises:
        UserError: the file is damaged or contains no Frozen in Time model.
    """
    if path.suffix == ".safetensors":
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: got {path}, which cannot be read ({reason(error)})") from None
        state_dict = {name.removeprefix(PARALLEL_PREFIX): tensor.float() for name, tensor in stored.items()}
        if VIDEO_CLS not in state_dict:
            raise UserError(f"checkpoint: got {path}, which lacks {VIDEO_CLS}")
        return {name: tensor for name, tensor in state_dict.items() if name not in IGNORED_KEYS}
    content = load_torch_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint: got {path}, which contains no state_dict")
    tensors: dict[str, LazyTensor] = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, LazyTensor):
            tensors[name.removeprefix(PARALLEL_PREFIX)] = value
    if VIDEO_CLS not in tensors:
        raise UserError(f"checkpoint: got {path}, whose state_dict lacks {VIDEO_CLS}")
    wanted = [name for name in tensors if name not in IGNORED_KEYS]
    return {name: tensor.float() for name, tensor in read_tensors(path, tensors, wanted).items()}


def shape_of(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return a tensor's shape.

    Raises:
        UserError: the state dict lacks the tensor.
    """
    if name not in state:
        raise UserError(f"checkpoint: {name} is missing; allowed: every weight of the released model")
    return tuple(state[name].shape)


def heads_of(width: int, name: str, key: str, told: int | None) -> int:
    """Return the number of attention heads: that of the config, or that of the released models of this width.

    Args:
        width: width of the tower.
        name: a tensor of this width, for messages.
        key: the config key that sets the number.
        told: value of the key.

    Raises:
        UserError: the width is not a multiple of the number of heads, or of the released head width.
    """
    if told is not None:
        if width % told:
            raise UserError(f"{key}: got {told}; allowed: a divisor of {width}, the width of {name}")
        return told
    if width % HEAD_WIDTH:
        got = f"got none, and {name} has width {width}, no multiple of {HEAD_WIDTH}"
        raise UserError(f"{key}: {got}; allowed: a number of heads")
    heads = width // HEAD_WIDTH
    level = logging.INFO if width == RELEASED_WIDTH else logging.WARNING
    log.log(
        level,
        "released files do not contain the number of attention heads: using %d (width %d / %d); %s sets it",
        heads,
        width,
        HEAD_WIDTH,
        key,
    )
    return heads


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of layers under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in state if (match := pattern.match(name))})


def video_size(state: Mapping[str, Tensor], heads: int | None = None) -> VideoSize:
    """Determine the video tower's sizes from its tensors' shapes; heads: model.video.heads."""
    width, channels, patch, _ = _shape(state, "video_model.patch_embed.proj.weight", 4)
    if channels != 3:
        raise UserError(f"checkpoint: video_model.patch_embed.proj.weight has {channels} channels; allowed: 3")
    _, positions, _ = _shape(state, "video_model.pos_embed", 3)
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise UserError(f"checkpoint: video_model.pos_embed has {positions} rows; allowed: 1 + a square number")
    hidden, _ = _shape(state, "video_model.blocks.0.mlp.fc1.weight", 2)
    return VideoSize(
        resolution=side * patch,
        patch=patch,
        width=width,
        depth=count_layers(state, "video_model.blocks."),
        heads=heads_of(width, VIDEO_CLS, "model.video.heads", heads),
        mlp_ratio=hidden // width,
    )


def text_config(state: Mapping[str, Tensor], heads: int | None = None) -> PreTrainedConfig:
    """Build the config of DistilBERT or BERT with the sizes of the text tower's tensors; heads: model.text.heads."""
    vocabulary, width = _shape(state, "text_model.embeddings.word_embeddings.weight", 2)
    positions, _ = _shape(state, "text_model.embeddings.position_embeddings.weight", 2)
    heads = heads_of(width, "text_model.embeddings.word_embeddings.weight", "model.text.heads", heads)
    layers = count_layers(state, "text_model.transformer.layer.")
    if layers:
        return DistilBertConfig(
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            dim=width,
            hidden_dim=shape_of(state, "text_model.transformer.layer.0.ffn.lin1.weight")[0],
            n_layers=layers,
            n_heads=heads,
        )
    layers = count_layers(state, "text_model.encoder.layer.")
    if not layers:
        raise UserError("checkpoint: text_model is neither DistilBERT nor BERT; allowed: those two")
    return BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=width,
        intermediate_size=shape_of(state, "text_model.encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _shape(state: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    shape = shape_of(state, name)
    if len(shape) != rank:
        raise UserError(f"checkpoint: {name} has shape {list(shape)}; allowed: {rank} axes")
    return shape
