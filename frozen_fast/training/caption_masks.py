"""Denoising masks (TeachText): the training captions for which a teacher retrieves the right video.

TeachText releases masks but not the code that generates them. This module keeps a caption if the teacher ranks its
video within a threshold. A video without such a caption keeps its best-ranked one.
"""

from __future__ import annotations

import torch

from frozen_fast.data import Source
from frozen_fast.data.load.feature_loader import FeatureFormat, FeatureReader
from frozen_fast.models.experts.expert_model import ExpertModel
from frozen_fast.models.retrieval_model import Features


@torch.no_grad()
def caption_masks(
    model: ExpertModel, source: Source, format: FeatureFormat, *, rank_below: int, batch_size: int = 256
) -> dict[str, list[int]]:
    """Masks of a training source.

    Args:
        model: the teacher, in eval mode.
        source: its videos are the gallery.
        format: what the teacher reads.
        rank_below: a caption is kept if fewer videos than this rank before its own (ties count half), that is if rank
            (from 1) <= rank_below.
        batch_size: videos, and captions, of a forward pass.

    Returns:
        video -> 0 or 1 for each caption.
    """
    reader = FeatureReader(source, format)
    gallery = [
        model.video_features(reader.videos(range(first, min(first + batch_size, len(source)))))
        for first in range(0, len(source), batch_size)
    ]
    video: Features = {name: torch.cat([part[name] for part in gallery]) for name in gallery[0]}
    captions = [(index, number) for index, clip in enumerate(source.clips) for number in range(len(clip.captions))]
    ranks: dict[int, list[float]] = {}
    for first in range(0, len(captions), batch_size):
        part = captions[first : first + batch_size]
        text = model.text_features(reader.tokens([(source.clips[index].id, number) for index, number in part]))
        sim_QV = model.pair_similarities(text, video).mean(0)
        own_Q1 = sim_QV.gather(1, torch.tensor([[index] for index, _ in part], device=sim_QV.device))
        above, equal = (sim_QV > own_Q1).sum(1), (sim_QV == own_Q1).sum(1)
        for (index, _), rank in zip(part, (above + (equal + 1) / 2).tolist(), strict=True):
            ranks.setdefault(index, []).append(rank)
    masks = {}
    for index, own in ranks.items():
        kept = [int(rank <= rank_below) for rank in own]
        if not any(kept):
            kept[own.index(min(own))] = 1
        masks[source.clips[index].id] = kept
    return masks
