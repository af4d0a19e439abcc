"""Twins: clips that a single frame cannot distinguish."""

from __future__ import annotations

import numpy as np

from frozen_fast.data.sources.clip import Source
from frozen_fast.errors import UserError


def twin_pairs(source: Source) -> np.ndarray:
    """The source's clips as pairs of twins.

    Args:
        source: its clips must be pairs of clips that name each other as twins.

    Returns:
        Indices into source.clips [clips / 2, 2], int64, in the order of the first of each pair.

    Raises:
        UserError: naming the first clip that is not in such a pair.
    """
    place = {clip.id: index for index, clip in enumerate(source.clips)}
    twin = np.array([-1 if clip.twin is None else place.get(clip.twin, -1) for clip in source.clips], dtype=np.int64)
    own = np.arange(len(twin))
    wrong = np.flatnonzero((twin < 0) | (twin == own) | (twin[twin] != own))
    if len(wrong):
        clip = source.clips[int(wrong[0])]
        raise UserError(
            f"data.sources[{source.name}].twins_together: got clip {clip.id!r} with twin {clip.twin!r}; allowed: "
            "sources of pairs of clips that name each other as twins"
        )
    return np.stack([own, twin], axis=1)[own < twin]
