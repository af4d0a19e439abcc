"""Reads SigLIP's published weights from a transformers folder, under the names of siglip_towers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frozen_fast.errors import UserError, some
from frozen_fast.models.clip.clip_weights import read_folder, transformers_layers
from frozen_fast.models.clip.siglip_towers import PAD_ID, SiglipImageTower, SiglipSize, SiglipTextTower
from frozen_fast.models.released.frozen import count_layers, shape_of

_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.head.probe": "visual.head.probe",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in {
            "text_model.final_layer_norm": "ln_final",
            "text_model.head": "head",
            "vision_model.embeddings.patch_embedding": "visual.conv1",
            "vision_model.post_layernorm": "visual.ln_post",
            "vision_model.head.attention.out_proj": "visual.head.out_proj",
            "vision_model.head.layernorm": "visual.head.ln",
            "vision_model.head.mlp.fc1": "visual.head.mlp.c_fc",
            "vision_model.head.mlp.fc2": "visual.head.mlp.c_proj",
        }.items()
        for kind in ("weight", "bias")
    },
    **{f"vision_model.head.attention.in_proj_{kind}": f"visual.head.in_proj_{kind}" for kind in ("weight", "bias")},
}
_SCALES = ("logit_scale", "logit_bias")


class SiglipWeights(NamedTuple):
    """A SigLIP model's weights in fp32 (the image tower's under `visual.`), its sizes and its learned scale and bias.

    Attributes:
        logit_scale: logarithm of the factor on cosine similarities.
        logit_bias: added to the scaled similarities.
    """

    state: dict[str, Tensor]
    size: SiglipSize
    logit_scale: float
    logit_bias: float


def read_siglip(source: str | Path) -> SiglipWeights:
    """Read a SigLIP model.

    Args:
        source: a transformers folder of a SiglipModel (config.json and weights).

    Raises:
        UserError: the folder is missing, damaged or unsupported, or its weights do not fit together.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"checkpoint: got {source}; allowed: a transformers folder of a SigLIP (config.json, weights)")
    state, config = read_folder(path)
    if "vision_model.head.probe" not in state:
        raise UserError(f"checkpoint: got {source}, which contains no SigLIP (no vision_model.head.probe)")
    size = _size_of(state, config, str(source))
    named = {_NAMES.get(name, name): value for name, value in state.items() if ".encoder.layers." not in name}
    for tower, root in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        named.update(transformers_layers(state, tower, root, str(source)))
    scale, bias = (float(named.pop(name, torch.zeros(1))) for name in _SCALES)
    with torch.device("meta"):
        towers = {"": SiglipTextTower(size), "visual.": SiglipImageTower(size)}
    wanted = {f"{root}{name}": value for root, tower in towers.items() for name, value in tower.state_dict().items()}
    for label, names in (("lacks", set(wanted) - set(named)), ("has unknown", set(named) - set(wanted))):
        if names:
            raise UserError(f"checkpoint: got {source}, which {label} {some(names)}; allowed: a SiglipModel")
    for name, value in wanted.items():
        if named[name].shape != value.shape:
            got = f"{name} has shape {list(named[name].shape)}"
            raise UserError(f"checkpoint: got {source}, whose {got}; allowed: {list(value.shape)}")
    return SiglipWeights({name: named[name].float().contiguous() for name in wanted}, size, scale, bias)


def load_side(tower: nn.Module, weights: SiglipWeights, root: str) -> None:
    """Copy one side's weights; root: "visual." or ""."""
    tower.load_state_dict({name: weights.state[root + name] for name in tower.state_dict()})


def _size_of(state: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> SiglipSize:
    """Determine sizes from the tensors' shapes; heads, activation and padding from config.json."""
    conv = shape_of(state, "vision_model.embeddings.patch_embedding.weight")
    patches, width = shape_of(state, "vision_model.embeddings.position_embedding.weight")
    side = math.isqrt(patches)
    if len(conv) != 4 or side * side != patches:
        raise UserError(f"checkpoint: got {source}, whose image positions have {patches} rows; allowed: a square")
    vocabulary, text_width = shape_of(state, "text_model.embeddings.token_embedding.weight")
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    return SiglipSize(
        resolution=int(image.get("image_size") or side * conv[2]),
        patch=conv[2],
        image_width=width,
        image_depth=count_layers(state, "vision_model.encoder.layers."),
        image_heads=int(image.get("num_attention_heads") or 12),
        image_hidden=shape_of(state, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        text_width=text_width,
        text_depth=count_layers(state, "text_model.encoder.layers."),
        text_heads=int(text.get("num_attention_heads") or 12),
        text_hidden=shape_of(state, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        context=shape_of(state, "text_model.embeddings.position_embedding.weight")[0],
        vocabulary=vocabulary,
        pad_id=int(text.get("pad_token_id", PAD_ID)),
        activation=image.get("hidden_act") or "gelu_pytorch_tanh",
    )
