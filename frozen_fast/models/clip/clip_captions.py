"""Text tower: CLIP's text tower with its tokenizer.

Axis letters: B captions, L tokens, E width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from frozen_fast.config.schema import TextTowerConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.clip_tokenizer import ClipTokenizer
from frozen_fast.models.clip.clip_towers import CLIP_SIZES, VOCABULARY, ClipSize, ClipTextTower
from frozen_fast.models.clip.clip_weights import read_clip
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import Tokenizer


class ClipCaptions(TextTower):
    """CLIP's text tower: captions -> the projected output at the end-of-text token."""

    name = "clip"
    keys = ("name", "weights", "max_tokens")

    def __init__(self, size: ClipSize, tokenizer: Tokenizer | None = None) -> None:
        """Build the tower with random weights.

        Args:
            size: CLIP's sizes.
            tokenizer: CLIP's tokenizer; None: the model takes token ids only.
        """
        super().__init__()
        self.size = size
        self.encoder = ClipTextTower(size)
        self.width, self.max_positions, self.vocabulary_size = size.embedding, size.context, size.vocabulary
        self.tokenizer = tokenizer

    @classmethod
    def from_config(cls, section: TextTowerConfig) -> ClipCaptions:
        """Build the tower of a config's model.text.

        model.text.name is a source for clip_weights.read_clip, or a size (ViT-B/32) if model.text.weights is random.
        """
        if section.name is None:
            raise UserError("model.text.name: got none; allowed with the tower clip: a CLIP file, folder or open_clip:")
        weights = None if section.weights == "random" else read_clip(section.name)
        if weights is None and section.name not in CLIP_SIZES:
            raise unknown_name("model.text.name", section.name, CLIP_SIZES)
        size = CLIP_SIZES[section.name] if weights is None else weights.size
        if size.vocabulary != VOCABULARY:
            raise UserError(f"model.text.name: got a vocabulary of {size.vocabulary}; allowed: CLIP's {VOCABULARY}")
        tower = cls(size, ClipTokenizer.build(section.max_tokens or size.context))
        if weights is not None:
            wanted = tower.encoder.state_dict()
            tower.encoder.load_state_dict({name: weights.state[name] for name in wanted})
        return tower

    @classmethod
    def from_architecture(
        cls, data: Mapping[str, Any], tokenizer: Tokenizer | None, section: TextTowerConfig | None = None
    ) -> ClipCaptions:
        """Build the tower that architecture() describes with random weights, and CLIP's tokenizer from a stored one."""
        return cls(ClipSize(**data["clip"]), None if tokenizer is None else ClipTokenizer.of(tokenizer))

    def architecture(self) -> dict[str, Any]:
        """Return CLIP's sizes."""
        return {"clip": asdict(self.size)}

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Encode tokens -> [B, E]; padding after the end of text has no effect, so the mask is not used."""
        return self.encoder(input_ids_BL)

    def token_features(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the projected output at every token -> [B, L, E]."""
        return self.encoder(input_ids_BL, all_tokens=True)
