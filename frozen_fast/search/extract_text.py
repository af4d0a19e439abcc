"""`frozen-fast extract --text`: token features of a store's captions by a text tower.

Axis letters: B captions, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frozen_fast.data.features.feature_store import FeatureStore, StoredFeature, write_contents, write_text
from frozen_fast.errors import UserError
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.search.embed_job import Progress
from frozen_fast.search.extract_job import check_name
from frozen_fast.search.index_folder import index_lock


@torch.no_grad()
def extract_text(
    folder: Path,
    name: str,
    tower: TextTower,
    *,
    device: torch.device,
    batch_size: int = 64,
    fresh: bool = False,
    progress: Callable[[int], Progress] = lambda total: lambda done, bad: None,
) -> StoredFeature:
    """Write the outputs of a text tower at every token of every caption, special tokens included.

    Args:
        folder: a store.
        name: of the text features.
        tower: with its tokenizer; put into eval mode.
        device: where it runs.
        batch_size: captions per forward pass.
        fresh: replace text features of that name.
        progress: called with the number of captions; returns a function that is called after each batch.

    Raises:
        UserError: no store, one without captions, or one that holds text features of that name.
    """
    check_name("--text", name)
    store = FeatureStore(folder)
    if name in store.texts and not fresh:
        raise UserError(f"--text: got {name!r}, which the store already contains; allowed: another name, or --fresh")
    captions = [caption for own in store.captions.values() for caption in own]
    if not captions:
        raise UserError(f"--output: got {folder}, whose videos have no captions; allowed: a source with captions")
    tower = tower.to(device).eval()
    tell = progress(len(captions))
    blocks = [captions[first : first + batch_size] for first in range(0, len(captions), batch_size)]

    def tokens(block: list[str]) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in tower.tokenize(block).items()}

    def stream() -> Iterator[np.ndarray]:
        for block in blocks:
            text = tokens(block)
            mask_BL = text["attention_mask"].bool()
            features_BLD = tower.token_features(text["input_ids"], text["attention_mask"])
            yield features_BLD[mask_BL].float().cpu().numpy()
            tell(len(block), 0)

    counts = iter([int(count) for block in blocks for count in tokens(block)["attention_mask"].sum(1)])
    lengths = [[next(counts) for _ in own] for own in store.captions.values()]
    with index_lock(folder):
        feature = write_text(folder, name, tower.width, lengths, stream)
        texts = {**store.texts, name: feature}
        write_contents(folder, len(store.captions), store.experts.values(), texts.values())
    return feature
