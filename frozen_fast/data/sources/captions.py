"""Selection of a clip's caption: pure functions of the captions and a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CaptionMode = Literal["random", "first", "paragraph", "all"]


@dataclass(frozen=True)
class CaptionRule:
    """How captions of a source are selected.

    Attributes:
        mode: random: training draws one, evaluation uses each. first: the first. paragraph: training joins a random
            number of them in their order (the paper's text augmentation for paragraph retrieval), evaluation
            joins all. all: training joins all, evaluation uses each.
        max_characters: a caption, or a joined paragraph, is truncated to this number of characters; 0: no limit.
    """

    mode: CaptionMode = "random"
    max_characters: int = 350

    def training(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """The caption of one training step."""
        if self.mode == "first" or len(captions) == 1:
            return self._cut(captions[0])
        if self.mode == "random":
            return self._cut(captions[int(rng.integers(len(captions)))])
        if self.mode == "all":
            return self._cut(" ".join(captions))
        count = int(rng.integers(1, len(captions) + 1))
        kept = sorted(rng.choice(len(captions), size=count, replace=False).tolist())
        return self._cut(" ".join(captions[index] for index in kept))

    def evaluation(self, captions: Sequence[str]) -> list[str]:
        """The evaluation queries of a clip."""
        if self.mode == "first":
            return [self._cut(captions[0])]
        if self.mode == "paragraph":
            return [self._cut(" ".join(captions))]
        return [self._cut(caption) for caption in captions]

    def _cut(self, text: str) -> str:
        return text[: self.max_characters] if self.max_characters else text
