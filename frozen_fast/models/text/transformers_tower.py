"""Text tower: a transformers model by name, local folder or installed package, pooled to one vector.

Axis letters: B captions, L tokens, D width.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import get_session
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BertConfig,
    CLIPTextConfig,
    DistilBertConfig,
    PreTrainedConfig,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from frozen_fast.config.model_defaults import TEXT_NAME
from frozen_fast.config.schema import TextTowerConfig
from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.text.text_shape import TextShape
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import TOKENIZER_FILE, Tokenizer

Pooling = Literal["auto", "cls", "mean", "pooler", "eos"]

DEFAULT_MAX_TOKENS = 77

KNOWN_ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "distilbert-base-uncased": DistilBertConfig,
    "bert-base-uncased": BertConfig,
    "t5-small": T5Config,
    "t5-base": partial(T5Config, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "openai/clip-vit-base-patch32": CLIPTextConfig,
}
"""Architectures whose sizes are given here or are transformers' defaults, so that the Hub is not needed."""

AUTO_POOLING: dict[str, Pooling] = {
    "t5": "mean",
    "mt5": "mean",
    "umt5": "mean",
    "clip_text_model": "eos",
}
"""transformers model type -> pooling for "auto". For other types "auto" is the model's pooler, or token 0."""

PACKAGE_PREFIX = "package:"
HUB_TIMEOUT_SECONDS = 10
DROPPED_KEYS = ("dtype", "transformers_version", "id2label", "label2id", "architectures")
"""Keys of a transformers config that do not describe the encoder."""
ATTENTION = "sdpa"
"""transformers' default.

It draws dropout in the same order as the released code, so that seeded runs agree. For short captions, eager attention
is not faster.
"""

MODELS_WITH_MASK_OF_FOUR_AXES = ("bert", "distilbert")
"""Models that accept a [B, 1, L, L] mask.

With a [B, L] mask they check whether it is all ones, which synchronises a GPU.
"""


class TransformersTower(TextTower):
    """An encoder of the transformers library with its tokenizer and pooling.

    The encoder's submodules are registered on this module, so that parameter names are those of the transformers model
    (and in DualEncoder those of the released checkpoints: text_model.embeddings..., text_model.transformer...).
    """

    name = "transformers"
    keys = ("name", "weights", "tokenizer", "max_tokens", "frozen_layers", "pooling", "heads")

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer | None, pooling: Pooling, source: str | None = None
    ) -> None:
        """Initialise from built parts; `build` creates them from names.

        Args:
            model: a transformers encoder.
            tokenizer: None: the model takes token ids only.
            pooling: "cls" (token 0), "mean" (over the mask), "pooler" (the model's own), "eos" (the caption's last
                token), or "auto" (AUTO_POOLING).
            source: the encoder's name for config.json.
        """
        super().__init__()
        self.config: PreTrainedConfig = model.config  # type: ignore[assignment]
        pooler = getattr(model, "pooler", None)
        if pooling == "auto":
            pooling = AUTO_POOLING.get(self.config.model_type, "cls" if pooler is None else "pooler")
        if pooling == "pooler" and pooler is None:
            raise UserError("model.text.pooling: got 'pooler', but the model has none; allowed: auto, cls, eos, mean")
        if pooling != "pooler" and pooler is not None:
            model.register_module("pooler", None)  # its weights would be unused, which DDP refuses
        if next(model.named_parameters(recurse=False), None) or next(model.named_buffers(recurse=False), None):
            raise UserError(f"model.text.name: got {type(model).__name__}, which has weights outside its parts")
        self._held = (model,)  # in a tuple, so that it is not registered and names have no extra prefix
        for name, child in model.named_children():
            self.add_module(name, child)
        self.pooling = pooling
        self.source = source
        self.width = int(self.config.hidden_size)
        self.vocabulary_size = int(self.config.vocab_size)
        self.max_positions = _max_positions(model)
        self.frozen_layers = 0
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)

    @property
    def model(self) -> nn.Module:
        """The transformers model."""
        return self._held[0]

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if len(tokenizer) > self.vocabulary_size:
            raise UserError(
                f"model.text.tokenizer: got a vocabulary of {len(tokenizer)}; allowed: up to the model's "
                f"{self.vocabulary_size}"
            )
        if self.max_positions is not None and tokenizer.max_tokens > self.max_positions:
            raise UserError(
                f"model.text.max_tokens: got {tokenizer.max_tokens}; allowed: up to the model's {self.max_positions}"
            )

    def train(self, mode: bool = True) -> TransformersTower:
        """Set the mode of the encoder and of its parts."""
        super().train(mode)
        self.model.train(mode)
        return self

    def freeze_layers(self, count: int) -> None:
        """Freeze the embeddings and the first layers, which then need no backward pass.

        Args:
            count: number of layers to freeze, from the input; 0: nothing is frozen, not even the embeddings.

        Raises:
            UserError: the tower has fewer layers, or an unknown structure.
        """
        self.frozen_layers = count
        if count == 0:
            return
        embeddings = getattr(self.model, "embeddings", None) or getattr(self.model, "embed_tokens", None)
        layers = next((part for part in self.model.modules() if isinstance(part, nn.ModuleList)), nn.ModuleList())
        if not isinstance(embeddings, nn.Module) or not 0 < count <= len(layers):
            raise UserError(f"model.text.frozen_layers: got {count}; allowed: 0 to {len(layers)}")
        for part in (embeddings, *layers[:count]):
            part.requires_grad_(False)

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Encode tokens -> [B, D], pooled, before any projection."""
        output = self._outputs(input_ids_BL, attention_mask_BL)
        if self.pooling == "pooler":
            return output.pooler_output
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        if self.pooling == "eos":
            rows_B = torch.arange(len(input_ids_BL), device=input_ids_BL.device)
            return output.last_hidden_state[rows_B, attention_mask_BL.sum(1) - 1]
        weights_BL1 = attention_mask_BL[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)

    def token_features(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the last layer's output at every token -> [B, L, D]."""
        return self._outputs(input_ids_BL, attention_mask_BL).last_hidden_state

    def _outputs(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Any:
        """Return the output of the transformers model."""
        mask = attention_mask_BL
        if self.config.model_type in MODELS_WITH_MASK_OF_FOUR_AXES:
            length = mask.shape[1]
            mask = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)
        return self.model(input_ids=input_ids_BL, attention_mask=mask)

    def forward_flops(self, tokens: int) -> float | None:
        """Compute FLOPs from the config's sizes if it names them as BERT does; otherwise count them."""
        shape = TextShape.from_config(self.config, pooler=self.pooling == "pooler")
        return super().forward_flops(tokens) if shape is None else shape.forward_flops(tokens)

    def frozen_flops(self, tokens: int) -> float:
        """Return the share of the frozen layers."""
        shape = TextShape.from_config(self.config)
        if shape is None or not any(parameter.requires_grad for parameter in self.parameters()):
            return super().frozen_flops(tokens)
        return self.frozen_layers * shape.layer_flops(tokens)

    def architecture(self) -> dict[str, Any]:
        """Return the transformers config without machine-specific paths and versions, and the pooling."""
        values = json.loads(self.config.to_json_string(use_diff=False))
        config = {key: value for key, value in values.items() if not key.startswith("_") and key not in DROPPED_KEYS}
        return {"name": self.source, "config": config, "pooling": self.pooling}

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], tokenizer: Tokenizer | None, section: TextTowerConfig | None = None
    ) -> TransformersTower:
        """Build the encoder that a config.json or a released file describes, without the Hub."""
        tower = cls(model_from_config(config_from_dict(data["config"])), tokenizer, data["pooling"], data.get("name"))
        tower.freeze_layers(0 if section is None else section.frozen_layers)
        return tower

    @classmethod
    def from_config(cls, section: TextTowerConfig) -> TransformersTower:
        """Build the tower of a config's model.text."""
        name = section.name or TEXT_NAME
        tower = cls.build(name, section.weights, section.tokenizer, section.max_tokens, section.pooling)
        tower.freeze_layers(section.frozen_layers)
        return tower

    @classmethod
    def check_agreement(cls, section: TextTowerConfig, data: Mapping[str, Any]) -> None:
        """Refuse another pooling than the checkpoint's, or a name with another architecture."""
        super().check_agreement(section, data)
        if section.pooling != "auto" and data["pooling"] not in ("auto", section.pooling):
            allowed = f"auto or {data['pooling']}, that of model.checkpoint"
            raise UserError(f"model.text.pooling: got {section.pooling!r}; allowed: {allowed}")
        if section.name is None or section.name == data.get("name"):
            return
        ours, stored = _sizes(_load_config(section.name)), _sizes(config_from_dict(data["config"]))
        if ours != stored:
            allowed = f"null, or a name of model.checkpoint's architecture ({stored})"
            raise UserError(f"model.text.name: got {section.name!r} ({ours}); allowed: {allowed}")

    @classmethod
    def build(
        cls,
        name: str,
        weights: Literal["pretrained", "random"] = "pretrained",
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        pooling: Pooling = "auto",
    ) -> TransformersTower:
        """Build a tower from names; the arguments are the keys of model.text.

        Args:
            name: a transformers name, a local folder, or package:MODULE/FOLDER inside an installed package.
            weights: "pretrained", or "random" for random weights.
            tokenizer: name or folder, in the same three forms; None: the tower's own.
            max_tokens: captions are truncated to this many tokens; None: 77, or the tower's maximum.
            pooling: see the constructor.

        Raises:
            UserError: naming model.text.name or model.text.tokenizer, if they cannot be loaded.
        """
        model = _load_model(name, weights)
        longest = max_tokens or default_max_tokens(_max_positions(model))
        return cls(model, load_tokenizer(tokenizer or name, longest), pooling, name)


def default_max_tokens(max_positions: int | None) -> int:
    """Return the default of model.text.max_tokens."""
    return min(DEFAULT_MAX_TOKENS, max_positions or DEFAULT_MAX_TOKENS)


def _max_positions(model: nn.Module) -> int | None:
    """Return the length of the longest caption in tokens; None for relative positions (T5)."""
    count = getattr(model.config, "max_position_embeddings", None)
    if not count or count < 0:
        return None
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa's first position comes after it
    return int(count) if padding is None else int(count) - padding - 1


def _sizes(config: PreTrainedConfig) -> str:
    """Describe an architecture for messages."""
    return f"{config.model_type} of width {config.hidden_size} with {config.num_hidden_layers} layers"


def local_folder(name: str, field: str) -> Path | None:
    """Return the folder of a name, or None for a name on the Hub.

    Raises:
        UserError: the package or folder does not exist.
    """
    if name.startswith(PACKAGE_PREFIX):
        module, _, inside = name[len(PACKAGE_PREFIX) :].partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{field}: got {name!r}; allowed: package:MODULE/FOLDER of an installed package")
        folder = Path(next(iter(spec.submodule_search_locations))) / inside
        if not folder.is_dir():
            raise UserError(f"{field}: got {name!r}; the installed package has no folder {inside!r}")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{field}: got {name!r}; no such folder")
    return None


def load_tokenizer(name: str, max_tokens: int) -> Tokenizer:
    """Load a tokenizer by transformers name, local folder or package:MODULE/FOLDER.

    Raises:
        UserError: naming model.text.tokenizer.
    """
    folder = local_folder(name, "model.text.tokenizer")
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.load(folder, max_tokens)
    loaded = _from_transformers(AutoTokenizer.from_pretrained, name, folder, "model.text.tokenizer")
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"model.text.tokenizer: got {name!r}, which has no fast tokenizer (tokenizer.json)")
    return Tokenizer(backend, max_tokens=max_tokens, pad_token=str(loaded.pad_token))


def model_from_config(config: PreTrainedConfig) -> nn.Module:
    """Build an encoder with random weights."""
    with _quiet():
        auto = _auto_class(config)
        return _encoder_alone(auto.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32))


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of the text encoder (T5 without decoder) if transformers has one, otherwise the model's."""
    known = type(config) in AutoModelForTextEncoding._model_mapping
    return AutoModelForTextEncoding if known else AutoModel


def _encoder_alone(model: nn.Module) -> nn.Module:
    """Return T5's stack of blocks, which contains the token embeddings; other encoders unchanged."""
    encoder = getattr(model, "encoder", None)
    shared = getattr(model, "shared", None)
    return encoder if isinstance(encoder, nn.Module) and isinstance(shared, nn.Embedding) else model


def config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    """Build a config from the result of to_dict."""
    values = dict(values)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"text.config: got a model that transformers does not know ({reason(error)})") from error


def _load_model(name: str, weights: str) -> nn.Module:
    """Build the encoder, pretrained or random."""
    if weights not in ("pretrained", "random"):
        raise UserError(f"model.text.weights: got {weights!r}; allowed: pretrained, random")
    folder = local_folder(name, "model.text.name")
    if weights == "random":
        return model_from_config(_load_config(name))
    config = _text_config(_from_transformers(AutoConfig.from_pretrained, name, folder, "model.text.name"))
    load = partial(
        _auto_class(config).from_pretrained,
        config=config,
        attn_implementation=ATTENTION,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = _from_transformers(load, name, folder, "model.text.name")
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"model.text.name: got {name!r}, whose weights lack {some(missing)}")
    if info["missing_keys"]:
        model.pooler = None  # a masked-language checkpoint has none; do not use random weights instead
    return _encoder_alone(model)


def _load_config(name: str) -> PreTrainedConfig:
    """Load the architecture of a name, without weights."""
    folder = local_folder(name, "model.text.name")
    if folder is None and name in KNOWN_ARCHITECTURES:
        return KNOWN_ARCHITECTURES[name]()
    return _text_config(_from_transformers(AutoConfig.from_pretrained, name, folder, "model.text.name"))


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text part of a model of text and images (CLIP); other models unchanged."""
    part = getattr(config, "text_config", None)
    return part if isinstance(part, PreTrainedConfig) else config


def _from_transformers(load: Callable[..., Any], name: str, folder: Path | None, field: str) -> Any:
    """Load from a local folder, otherwise from the Hub's local cache, otherwise from the Hub.

    The Hub is contacted once first, because its client would retry for a minute on a machine without network.

    Raises:
        UserError: naming the field.
    """
    try:
        with _quiet():
            if folder is not None:
                return load(str(folder), local_files_only=True)
            try:
                return load(name, local_files_only=True)
            except (OSError, ValueError):
                get_session().head(ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
                return load(name)
    except Exception as error:  # the Hub's client raises many types
        raise UserError(
            f"{field}: got {name!r}, which could not be loaded ({reason(error)}); allowed: a transformers name, a "
            f"local folder, package:MODULE/FOLDER (without a network: copy the model's folder and set {field} to it)"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and reports; this module raises errors itself."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
