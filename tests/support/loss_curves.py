"""Fifty training steps of a small dual encoder through a stage change, for comparing what computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.losses import contrastive_loss
from frozen_fast.models import SpaceTimeTransformer
from frozen_fast.models.video.temporal import expand_temporal_embedding


@dataclass(frozen=True)
class Course:
    """A tower, and stages of (frames, clips of a batch, steps)."""

    depth: int
    width: int
    stages: tuple[tuple[int, int, int], ...]


COURSE = Course(depth=2, width=32, stages=((1, 6, 25), (4, 3, 25)))
INTERPRETED = Course(depth=1, width=16, stages=((1, 2, 25), (4, 2, 25)))
"""Small enough for Triton's interpreter."""


def loss_curve(attention: str, fused_ops: str, course: Course = COURSE) -> list[float]:
    """The loss of each step in fp32; clips pass by again and again, so it falls."""
    torch.manual_seed(0)
    size = VideoSize(resolution=32, patch=16, width=course.width, depth=course.depth, heads=2)
    tower = SpaceTimeTransformer(
        size, 4, attention=attention, fused_ops=fused_ops, time_init="random", full_last_block=True
    )
    captions = nn.Embedding(6, size.width)
    clips = torch.randn(6, 4, 3, size.resolution, size.resolution)
    optimizer = torch.optim.AdamW([*tower.parameters(), *captions.parameters()], lr=1e-3)
    losses = []
    for frames, batch, steps in course.stages:
        if frames > 1:
            with torch.no_grad():
                tower.temporal_embed.copy_(expand_temporal_embedding(tower.temporal_embed[:, :1], frames, "bilinear"))
        for step in range(steps):
            rows = (torch.arange(batch) + step * batch) % 6
            loss = contrastive_loss(tower(clips[rows, :frames]), captions(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
