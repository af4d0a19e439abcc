"""Clips that one frame cannot tell apart, for training as for evaluation."""

from __future__ import annotations

import numpy as np

from frozen_fast.data.sources.clip import Source
from frozen_fast.errors import UserError


def twin_pairs(source: Source) -> np.ndarray:
    """The source's clips as pairs of twins.

    Args:
        source: every clip names another of the source as its twin, and is named by it.

    Returns:
        Indices into source.clips [clips / 2, 2], int64, in the order of the first of each pair.

    Raises:
        UserError: naming the first clip without a twin of its own.
    """
    place = {clip.id: index for index, clip in enumerate(source.clips)}
    twin = np.array([-1 if clip.twin is None else place.get(clip.twin, -1) for clip in source.clips], dtype=np.int64)
    own = np.arange(len(twin))
    wrong = np.flatnonzero((twin < 0) | (twin == own) | (twin[twin] != own))
    if len(wrong):
        clip = source.clips[int(wrong[0])]
        raise UserError(
            f"data.sources[{source.name}].twins_together: got clip {clip.id!r} with twin {clip.twin!r}; allowed: "
            "sources in which every clip names another as its twin and is named by it"
        )
    return np.stack([own, twin], axis=1)[own < twin]
