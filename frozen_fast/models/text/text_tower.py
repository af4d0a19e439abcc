"""The interface of text towers: an embedding per caption, and properties that training uses.

Axis letters: B captions, L tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from frozen_fast.config.schema import TextTowerConfig
from frozen_fast.errors import UserError
from frozen_fast.models.counted_flops import counted_flops
from frozen_fast.models.repeated_blocks import find_repeated_blocks
from frozen_fast.models.text.tokenizer import TOKENIZER_FORMS, Tokenizer


class TextTower(nn.Module, ABC):
    """Captions -> one vector each.

    Attributes:
        name: its name in frozen_fast.config.extensions.text_towers, written to config.json.
        keys: the keys of model.text that it reads, in addition to tower and options. Setting another key is an error.
        width: D.
        max_positions: largest L; None: any.
        vocabulary_size: number of token ids.
        tokenizer: None: the model takes token ids only.
        frozen_layers: number of frozen layers, counted from the embeddings.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ("name", "weights", "tokenizer", "max_tokens")
    width: int
    max_positions: int | None
    vocabulary_size: int
    tokenizer: Tokenizer | None = None
    frozen_layers: int = 0

    @classmethod
    @abstractmethod
    def from_config(cls, section: TextTowerConfig) -> Self:
        """Build a tower with its tokenizer and the weights that a config names.

        Raises:
            UserError: naming the key under model.text.
        """

    @classmethod
    @abstractmethod
    def from_architecture(
        cls, data: Mapping[str, Any], tokenizer: Tokenizer | None, section: TextTowerConfig | None = None
    ) -> Self:
        """Build the tower that architecture() describes, whose weights are loaded afterwards.

        Args:
            data: the result of architecture().
            tokenizer: the checkpoint's tokenizer or another one; None: none.
            section: keys that do not describe the architecture (frozen_layers); None: defaults.
        """

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return data for from_architecture that JSON can represent, without the tower's name."""

    @classmethod
    def check_agreement(cls, section: TextTowerConfig, data: Mapping[str, Any]) -> None:
        """Refuse keys that contradict a checkpoint's architecture; keys that were not set are none.

        Raises:
            UserError: naming the key, the value and the checkpoint's.
        """
        told = data.get("options") or {}
        for key, said in section.options:
            if key in told and said != told[key]:
                allowed = f"{told[key]!r}, that of model.checkpoint"
                raise UserError(f"model.text.options.{key}: got {said!r}; allowed: {allowed}")

    @abstractmethod
    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Encode tokens -> [B, D], pooled, before any projection. The mask is 1 for tokens, which come first."""

    def token_features(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the output at every token -> [B, L, D], the text input of expert models.

        Raises:
            UserError: the tower has pooled outputs only.
        """
        raise UserError(f"text tower: got {self.name}, which has no output for each token; allowed: transformers, clip")

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise captions -> {"input_ids", "attention_mask"}, int64 [B, L].

        Raises:
            UserError: the tower has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(f"tokenizer: got none, but captions are strings; allowed: {TOKENIZER_FORMS}")
        return self.tokenizer(captions)

    def freeze_layers(self, count: int) -> None:
        """Freeze the embeddings and the first layers, which then need no backward pass.

        Args:
            count: number of layers to freeze, from the input; 0: nothing is frozen, not even the embeddings.

        Raises:
            UserError: more layers than the tower has.
        """
        if count:
            raise UserError(f"model.text.frozen_layers: got {count}; allowed: 0 with the text tower {self.name}")

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks that make up most of the tower, the units of sharding."""
        return find_repeated_blocks(self)

    def forward_flops(self, tokens: int) -> float | None:
        """Return the forward FLOPs of one caption of L tokens (a multiply-add counts as 2); None if unknown."""
        return counted_flops(self._bare_copy, (1, tokens), (1, tokens), dtype=torch.long)

    def frozen_flops(self, tokens: int) -> float:
        """Return the share of forward_flops without a backward pass."""
        learns = any(parameter.requires_grad for parameter in self.parameters())
        return 0.0 if learns else self.forward_flops(tokens) or 0.0

    def _bare_copy(self) -> nn.Module:
        return type(self).from_architecture(self.architecture(), None)
