"""Builds a dual encoder from the config's model section."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_fast.config.extensions import text_towers, video_towers
from frozen_fast.config.fields import keys_of
from frozen_fast.config.model_defaults import with_model_defaults
from frozen_fast.config.schema import ModelConfig, TextTowerConfig, VideoTowerConfig
from frozen_fast.errors import UserError
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.pretrained import StoredModel, own_tokenizer, read_model
from frozen_fast.models.text.tokenizer import TOKENIZER_FORMS
from frozen_fast.models.text.transformers_tower import load_tokenizer
from frozen_fast.models.video.video_tower import IMAGENET_MEAN, IMAGENET_STD, VideoTower, check_frames

log = logging.getLogger(__name__)

INITIAL_VALUES = ("weights", "time_init", "position_init_std", "temporal_init_std")
"""Keys of model.video that have no effect with a checkpoint."""

OF_EVERY_TOWER = ("tower", "options", "checkpointed_blocks")


def check_model(config: ModelConfig, frames: Sequence[tuple[str, int]]) -> None:
    """Check the model section before anything is read or built; this does not open a checkpoint.

    Args:
        config: the config's model section.
        frames: (config key, number of frames) of every stage and of the evaluation.

    Raises:
        UserError: naming the key.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        if not path.exists():
            raise UserError(f"model.checkpoint: got {config.checkpoint!r}; no such file or folder")
        return
    config = with_model_defaults(config)
    tower: type[VideoTower] = video_towers.load(str(config.video.tower))
    refuse_unread_keys("model.video", config.video, tower.name, (*OF_EVERY_TOWER, *tower.keys))
    text = text_towers.load(str(config.text.tower))
    refuse_unread_keys("model.text", config.text, text.name, (*OF_EVERY_TOWER, *text.keys))
    check_frames(tower, config.video, frames)


def refuse_unread_keys(path: str, section: VideoTowerConfig | TextTowerConfig, tower: str, read: Sequence[str]) -> None:
    """Refuse keys that are set but that the selected tower does not read.

    Raises:
        UserError: naming the key.
    """
    for info in keys_of(type(section)):
        value = getattr(section, info.name)
        if value != info.default and info.name not in read:
            raise UserError(f"{path}.{info.name}: got {value!r}; allowed: nothing, the tower {tower} does not read it")


def build_dual_encoder(
    config: ModelConfig,
    *,
    max_frames: int,
    first_frames: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    resuming: bool = False,
) -> DualEncoder:
    """Build the model of a config; random weights come from torch's global generator.

    Args:
        config: the config's model section.
        max_frames: most frames of any stage, the number of rows of the frame embeddings.
        first_frames: frames of the first stage. This many rows count as learned, or all that a checkpoint learned if
            these are more. A checkpoint that learned fewer is expanded by config.expansion.
        mean: mean of the training data's pixels, RGB in [0, 1]; a checkpoint keeps its own.
        std: their standard deviation; likewise.
        resuming: model.checkpoint is this run's own; it is not compared with the config, and its rows are kept.

    Raises:
        UserError: naming the key under model.
    """
    if config.checkpoint is not None:
        return _from_checkpoint(config, max_frames, first_frames, resuming)
    config = with_model_defaults(config)
    check_model(config, [("max_frames", max_frames), ("first_frames", first_frames)])
    tower: type[VideoTower] = video_towers.load(str(config.video.tower))
    video = tower.from_config(config.video, max_frames=max_frames)
    text = text_towers.load(str(config.text.tower)).from_config(config.text)
    options: dict[str, Any] = {"embedding_width": config.embedding_width, "text_activation": config.text_activation}
    return DualEncoder(video, text, learned_frames=first_frames, mean=mean, std=std, **options)


def _from_checkpoint(config: ModelConfig, max_frames: int, first_frames: int, resuming: bool) -> DualEncoder:
    """Start from a checkpoint, with max_frames rows of frame embeddings."""
    model = load_checkpoint(config, max_frames=max_frames, keep_rows=resuming, compare=not resuming)
    model.expand_frames(max(first_frames, model.learned_frames), config.expansion)
    if model.text_model.tokenizer is None:
        raise UserError(f"model.text.tokenizer: got none, and the checkpoint has none; allowed: {TOKENIZER_FORMS}")
    return model.train()


def load_checkpoint(
    config: ModelConfig,
    num_frames: int | None = None,
    *,
    max_frames: int | None = None,
    keep_rows: bool = False,
    compare: bool = True,
) -> DualEncoder:
    """Load the model of config.checkpoint, in eval mode.

    The tokenizer is model.text.tokenizer, otherwise the checkpoint's, otherwise that of its text tower.

    Args:
        config: the config's model section.
        num_frames: see DualEncoder.from_pretrained.
        max_frames: see DualEncoder.from_pretrained.
        keep_rows: allocate at least as many rows of the frame embeddings as the checkpoint has, learned or not, so that
            the optimizer's state fits.
        compare: refuse keys that contradict the checkpoint.

    Raises:
        UserError: a key contradicts the checkpoint, or its file cannot be used.
    """
    assert config.checkpoint is not None
    path = Path(config.checkpoint).expanduser()
    heads = {"video_heads": config.video.heads, "text_heads": config.text.heads}
    stored = read_model(path, config.text.tokenizer, config.text.max_tokens, **heads)
    if compare:
        check_agreement(config, stored)
    own = own_tokenizer(path, stored.architecture)
    name = config.text.name or own if compare else own or config.text.name
    if stored.tokenizer is None and name is not None:
        longest = config.text.max_tokens or stored.architecture["text"]["max_tokens"]
        stored.tokenizer = load_tokenizer(name, longest)
    if keep_rows:
        max_frames = max(max_frames or 1, stored.architecture["video"]["max_frames"])
    return DualEncoder.from_stored(stored, path, num_frames, config.expansion, max_frames=max_frames, config=config)


def check_agreement(config: ModelConfig, stored: StoredModel) -> None:
    """Refuse keys that contradict a checkpoint, and log keys that have no effect with one.

    Raises:
        UserError: naming the key, the value and the checkpoint's.
    """
    told = stored.architecture
    for key in ("embedding_width", "text_activation"):
        said = getattr(config, key)
        if said is not None and said != told[key]:
            raise UserError(f"model.{key}: got {said!r}; allowed: {told[key]!r}, that of model.checkpoint")
    for side, section, towers in (("video", config.video, video_towers), ("text", config.text, text_towers)):
        path, name = f"model.{side}", told[side]["tower"]
        if section.tower is not None and section.tower != name:
            raise UserError(f"{path}.tower: got {section.tower!r}; allowed: {name!r}, that of model.checkpoint")
        tower = towers.load(name)
        refuse_unread_keys(path, section, name, (*OF_EVERY_TOWER, *tower.keys))
        tower.check_agreement(section, told[side])
    plain = VideoTowerConfig()
    unused = [f"model.video.{key}" for key in INITIAL_VALUES if getattr(config.video, key) != getattr(plain, key)]
    unused += ["model.text.weights"] if config.text.weights == "random" else []
    if unused:
        log.info("model.checkpoint gives the weights; not used: %s", ", ".join(unused))
