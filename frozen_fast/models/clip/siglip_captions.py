"""Text tower: SigLIP's text tower with the tokenizer of its folder.

Axis letters: B captions, L tokens, E width of SigLIP's common space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from frozen_fast.config.schema import TextTowerConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.siglip_towers import SIGLIP_SIZES, SiglipSize, SiglipTextTower
from frozen_fast.models.clip.siglip_weights import load_side, read_siglip
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import Tokenizer
from frozen_fast.models.text.transformers_tower import load_tokenizer


class SiglipCaptions(TextTower):
    """SigLIP's text tower: captions -> the projected output at the last position."""

    name = "siglip"
    keys = ("name", "weights", "tokenizer", "max_tokens")

    def __init__(self, size: SiglipSize, tokenizer: Tokenizer | None = None) -> None:
        """Build the tower with random weights.

        Args:
            size: SigLIP's sizes.
            tokenizer: SigLIP's tokenizer; None: the model takes token ids only.
        """
        super().__init__()
        self.size = size
        self.encoder = SiglipTextTower(size)
        self.width, self.max_positions, self.vocabulary_size = size.embedding, size.context, size.vocabulary
        self.tokenizer = tokenizer
        if tokenizer is not None:
            if len(tokenizer) > size.vocabulary:
                got = f"got a tokenizer of {len(tokenizer)} ids"
                raise UserError(f"model.text.tokenizer: {got}; allowed: up to {size.vocabulary}, SigLIP's vocabulary")
            self.encoder.pad_id = tokenizer.pad_id

    @classmethod
    def from_config(cls, section: TextTowerConfig) -> SiglipCaptions:
        """Build the tower of a config's model.text.

        model.text.name is a transformers folder, whose tokenizer is used unless model.text.tokenizer names another; or
        a size (base-patch16-224) if model.text.weights is random.
        """
        if section.name is None:
            raise UserError("model.text.name: got none; allowed with the tower siglip: a transformers folder")
        weights = None if section.weights == "random" else read_siglip(section.name)
        if weights is None and section.name not in SIGLIP_SIZES:
            raise unknown_name("model.text.name", section.name, SIGLIP_SIZES)
        if weights is None and section.tokenizer is None:
            raise UserError("model.text.tokenizer: got none with random weights; allowed: a folder with a tokenizer")
        size = SIGLIP_SIZES[section.name] if weights is None else weights.size
        longest = section.max_tokens or size.context
        if longest > size.context:
            raise UserError(f"model.text.max_tokens: got {longest}; allowed: up to {size.context}")
        tower = cls(size, load_tokenizer(section.tokenizer or section.name, longest))
        if weights is not None:
            load_side(tower.encoder, weights, "")
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], tokenizer: Tokenizer | None, section: TextTowerConfig | None = None
    ) -> SiglipCaptions:
        """Build the tower that architecture() describes, with random weights."""
        return cls(SiglipSize(**data["siglip"]), tokenizer)

    def architecture(self) -> dict[str, Any]:
        """Return SigLIP's sizes."""
        return {"siglip": asdict(self.size)}

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Encode tokens -> [B, E]. Attention includes padding, as in Google's training, so the mask is not used."""
        return self.encoder(input_ids_BL)
