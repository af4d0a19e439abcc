"""FLOPs of a transformer text encoder, computed from its sizes.

A multiply-add counts as 2, matrix products only. Axis letters: L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes of a transformer whose layers have four D x D projections, attention and a two-layer MLP."""

    width: int
    layers: int
    feed_forward_width: int
    pooler: bool = False

    @classmethod
    def from_config(cls, config: Any, *, pooler: bool = False) -> TextShape | None:
        """Read a transformers config (names of DistilBERT, BERT or CLIP); None if it has other names."""
        values = config.to_dict()
        width = values.get("dim") or values.get("hidden_size")
        layers = values.get("n_layers") or values.get("num_hidden_layers")
        hidden = values.get("hidden_dim") or values.get("intermediate_size")
        if not (width and layers and hidden):
            return None
        return cls(width=width, layers=layers, feed_forward_width=hidden, pooler=pooler)

    def forward_flops(self, tokens: int) -> float:
        """Return the forward FLOPs for one caption of L tokens."""
        return self.layers * self.layer_flops(tokens) + self.pooler * 2.0 * self.width**2

    def layer_flops(self, tokens: int) -> float:
        """Return the forward FLOPs of one layer for one caption of L tokens."""
        linear = 2.0 * self.width * self.width
        attention = 4 * linear * tokens + 4.0 * self.width * tokens**2
        return attention + 4.0 * self.width * self.feed_forward_width * tokens
