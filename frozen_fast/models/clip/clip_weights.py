"""Reads CLIP's published weights (files of OpenAI, open_clip and transformers) under OpenAI's parameter names.

No code from a file is executed: TorchScript archives and torch pickles are read by the restricted unpickler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.clip.clip_blocks import HEAD_WIDTH, Activation
from frozen_fast.models.clip.clip_towers import Clip, ClipSize
from frozen_fast.models.released.frozen import count_layers, shape_of
from frozen_fast.models.released.jit_archive import is_jit_archive, load_jit_archive
from frozen_fast.models.released.torch_pickle import LazyTensor, load_torch_pickle, read_tensors

OPEN_CLIP_PREFIX = "open_clip:"
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of data parallelism and torch.compile."""

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "logit_bias")
"""Last parts of the names of settings and masks."""

FOLDER_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Names of weight files in a folder, in order of preference."""

_TRANSFORMERS_TEXT = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSFORMERS_IMAGE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSFORMERS_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_TRANSFORMERS_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class ClipWeights(NamedTuple):
    """A CLIP model's weights in fp32 under OpenAI's names, and its sizes."""

    state: dict[str, Tensor]
    size: ClipSize

    def build(self, **options: Any) -> Clip:
        """Build the model with these weights.

        Args:
            options: options of Clip.
        """
        with torch.device("meta"):
            model = Clip(self.size, **options)
        model.load_state_dict(self.state, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model


def read_clip(source: str | Path, activation: Activation | None = None) -> ClipWeights:
    """Read a CLIP model (ViT image tower).

    Args:
        source: OpenAI's .pt file (TorchScript archive or state dict), open_clip's .bin, .pt or .safetensors, a
            transformers folder (config.json and weights), or open_clip:MODEL/TAG, which open_clip downloads.
        activation: "quick_gelu" or "gelu"; None: that of a folder's config.json, otherwise quick_gelu, as for OpenAI's
            weights (most weights of open_clip use gelu, which their files do not state).

    Returns:
        Weights in fp32, and sizes.

    Raises:
        UserError: the file is missing, damaged or unsupported, or its weights do not fit together.
    """
    text = str(source)
    if text.startswith(OPEN_CLIP_PREFIX):
        state, config = _downloaded(text)
    else:
        state, config = _read(Path(text).expanduser())
    return clip_from_state(state, text, activation=activation, config=config)


def clip_from_state(
    state: Mapping[str, Tensor],
    source: str,
    *,
    activation: Activation | None = None,
    config: Mapping[str, Any] | None = None,
) -> ClipWeights:
    """Convert a state dict of any supported form to OpenAI's names, and determine the sizes.

    Args:
        state: weights.
        source: their origin, for messages.
        activation: see read_clip.
        config: content of a transformers config.json, if there is one.

    Raises:
        UserError: it is not a CLIP with a ViT, or a weight is missing, unknown or has another shape.
    """
    named = _openai_names(_plain_names(state), source)
    size = _size_of(named, source, config or {}, activation)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Clip(size).state_dict().items()}
    for label, names in (("lacks", set(wanted) - set(named)), ("has unknown", set(named) - set(wanted))):
        if names:
            raise UserError(f"checkpoint: got {source}, which {label} {some(names)}; allowed: a CLIP with a ViT")
    for name, shape in wanted.items():
        got = tuple(named[name].shape)
        if got != shape and math.prod(got) == math.prod(shape) == 1:
            named[name] = named[name].reshape(shape)  # logit_scale is [] or [1]
        elif got != shape:
            raise UserError(f"checkpoint: got {source}, whose {name} has shape {list(got)}; allowed: {list(shape)}")
    return ClipWeights({name: named[name].float().contiguous() for name in wanted}, size)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file's or folder's state dict, and the content of config.json."""
    if path.is_dir():
        return read_folder(path)
    return read_state(path), {}


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder's state dict, and the content of config.json.

    Raises:
        UserError: the folder has no weights, or a file is damaged.
    """
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"checkpoint: got {path}; allowed: a folder with {' or '.join(FOLDER_FILES[:2])}")
    return read_state(found), _folder_config(path / "config.json")


def _folder_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: got {path}, which is not JSON ({reason(error)})") from error
    return config if isinstance(config, dict) else {}


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict file: TorchScript archive, torch pickle (with or without a "state_dict" key) or safetensors.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: got {path}, which cannot be read ({reason(error)})") from error
    content = load_jit_archive(path) if is_jit_archive(path) else load_torch_pickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint: got {path}, which contains no state dict")
    lazy = {str(name): value for name, value in content.items() if isinstance(value, LazyTensor)}
    return read_tensors(path, lazy, list(lazy))


def _downloaded(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a model of the open_clip library from its cache or by download."""
    name, _, tag = source[len(OPEN_CLIP_PREFIX) :].partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"checkpoint: got {source}; allowed with the extra: pip install frozen-fast[clip]") from error
    try:
        model = open_clip.create_model(name, pretrained=tag)
        act = "quick_gelu" if type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU" else "gelu"
    except Exception as error:  # the download raises many types
        raise UserError(
            f"checkpoint: got {source}, which could not be loaded ({reason(error)}); allowed: open_clip:MODEL/TAG "
            "with a network or a filled cache, or a local file"
        ) from error
    return dict(model.state_dict()), {"vision_config": {"hidden_act": act}}


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights only, without the wrappers' prefixes."""
    plain = {}
    for name, value in state.items():
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
        if name.rpartition(".")[2] not in NOT_WEIGHTS:
            plain[name] = value
    return plain


def _openai_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert the names of OpenAI, open_clip (text tower under `text.`) or transformers to OpenAI's."""
    if "visual.conv1.weight" in state:
        return {name.removeprefix("text."): value for name, value in state.items()}
    if "vision_model.embeddings.class_embedding" in state:
        return _from_transformers(state, source)
    if "vision_model.head.probe" in state:
        got = "a SigLIP, whose ViT has no CLS token"
        raise UserError(f"checkpoint: got {source}, which contains {got}; allowed: a CLIP, or the towers siglip")
    raise UserError(f"checkpoint: got {source}, which contains no ViT of CLIP (no visual.conv1.weight)")


def _from_transformers(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert the names of transformers' CLIPModel to OpenAI's."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _TRANSFORMERS_TRANSPOSED:
            named[_TRANSFORMERS_TRANSPOSED[name]] = value.t()
        elif name in _TRANSFORMERS_TEXT or name in _TRANSFORMERS_IMAGE:
            named[_TRANSFORMERS_TEXT.get(name) or _TRANSFORMERS_IMAGE[name]] = value
        elif not name.startswith(("text_model.encoder.layers.", "vision_model.encoder.layers.")):
            named[name] = value  # unknown: reported by its original name
    for tower, root in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        named.update(transformers_layers(state, tower, root, source))
    return named


def transformers_layers(state: Mapping[str, Tensor], tower: str, root: str, source: str) -> dict[str, Tensor]:
    """Convert the layers of one of transformers' towers (`tower`.encoder.layers) to ClipTransformer's under `root`.

    Raises:
        UserError: a projection of queries, keys or values is missing.
    """
    named = {}
    for layer in range(count_layers(state, f"{tower}.encoder.layers.")):
        old, new = f"{tower}.encoder.layers.{layer}", f"{root}.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [f"{old}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            missing = [part for part in parts if part not in state]
            if missing:
                raise UserError(f"checkpoint: got {source}, which lacks {some(missing)}")
            named[f"{new}.attn.in_proj_{kind}"] = torch.cat([state[part] for part in parts])
            for theirs, ours in _TRANSFORMERS_LAYER.items():
                if f"{old}.{theirs}.{kind}" in state:
                    named[f"{new}.{ours}.{kind}"] = state[f"{old}.{theirs}.{kind}"]
    return named


def _size_of(
    state: Mapping[str, Tensor], source: str, config: Mapping[str, Any], activation: Activation | None
) -> ClipSize:
    """Determine sizes from shapes; heads and activation come from config.json or are the published ones."""
    conv = shape_of(state, "visual.conv1.weight")
    positions = shape_of(state, "visual.positional_embedding")
    side = math.isqrt(max(positions[0] - 1, 0))
    if len(conv) != 4 or side < 1 or side * side != positions[0] - 1:
        raise UserError(f"checkpoint: got {source}, whose image positions have shape {list(positions)}")
    vocabulary, text_width = shape_of(state, "token_embedding.weight")
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    stated = activation or image.get("hidden_act") or config.get("hidden_act") or "quick_gelu"
    return ClipSize(
        embedding=shape_of(state, "visual.proj")[-1],
        resolution=side * conv[2],
        patch=conv[2],
        image_width=conv[0],
        image_depth=count_layers(state, "visual.transformer.resblocks."),
        image_heads=int(image.get("num_attention_heads") or conv[0] // HEAD_WIDTH),
        image_hidden=shape_of(state, "visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        text_width=text_width,
        text_depth=count_layers(state, "transformer.resblocks."),
        text_heads=int(text.get("num_attention_heads") or text_width // HEAD_WIDTH),
        text_hidden=shape_of(state, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        context=shape_of(state, "positional_embedding")[0],
        vocabulary=vocabulary,
        activation=stated,
    )
