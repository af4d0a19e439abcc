"""A dual encoder from its part of the config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import ModelConfig
from frozen_fast.config.video_sizes import VIDEO_SIZES
from frozen_fast.errors import UserError
from frozen_fast.models.dual_encoder import IMAGENET_MEAN, IMAGENET_STD, DualEncoder
from frozen_fast.models.text.tower import TextTower
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.vit_weights import load_vit_weights


def build_dual_encoder(
    config: ModelConfig,
    *,
    max_frames: int,
    first_frames: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DualEncoder:
    """Build the model that a config describes; draws weights from torch's global random state.

    Args:
        config: the config's model section.
        max_frames: most frames of any stage: rows of temporal_embed.
        first_frames: frames of the first stage. Rows that count as learned: these, or all that a checkpoint learned
            if it learned more; a checkpoint that learned fewer is expanded by config.expansion.
        mean: of the training data's pixels; a checkpoint keeps its own.
        std: likewise.

    Raises:
        UserError: naming the key under model.
    """
    video = config.video
    options: dict[str, Any] = {
        "block": video.block,
        "attention": video.attention,
        "fused_ops": video.fused_ops,
        "skip_time_attention_at_one_frame": video.skip_time_attention_at_one_frame,
        "checkpointed_blocks": video.checkpointed_blocks,
        "full_last_block": video.full_last_block,
    }
    if config.checkpoint is not None:
        return _from_checkpoint(config, max_frames, first_frames, options)
    tower = SpaceTimeTransformer(
        VIDEO_SIZES[video.size],
        max_frames,
        time_init=video.time_init,
        position_init_std=video.position_init_std,
        temporal_init_std=video.temporal_init_std,
        **options,
    )
    if video.weights != "none":
        load_vit_weights(tower, video.weights)
    text = config.text
    text_tower = TextTower.build(text.name, text.weights, text.tokenizer, text.max_tokens, text.pooling)
    text_tower.freeze_layers(text.frozen_layers)
    return DualEncoder(
        tower,
        text_tower,
        embedding_width=config.embedding_width,
        text_activation=config.text_activation,
        learned_frames=first_frames,
        mean=mean,
        std=std,
    )


def _from_checkpoint(config: ModelConfig, max_frames: int, first_frames: int, options: dict[str, Any]) -> DualEncoder:
    """Start from a checkpoint, with room for max_frames."""
    assert config.checkpoint is not None
    path = Path(config.checkpoint).expanduser()
    model = DualEncoder.from_pretrained(
        path,
        None,
        config.expansion,
        config.text.tokenizer,
        max_frames=max_frames,
        max_tokens=config.text.max_tokens,
        video_options=options,
    )
    model.text_model.freeze_layers(config.text.frozen_layers)
    model.expand_frames(max(first_frames, model.learned_frames), config.expansion)
    if model.text_model.tokenizer is None:
        raise UserError("model.text.tokenizer: got none, and the checkpoint carries none; allowed: a name or folder")
    return model.train()
