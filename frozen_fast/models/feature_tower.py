"""A network for feature extraction from windows of frames: a video tower, or a whole model.

Axis letters: N windows, T frames, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frozen_fast.config import ExperimentConfig
from frozen_fast.config.extensions import video_towers
from frozen_fast.config.model_defaults import with_model_defaults
from frozen_fast.errors import UserError
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.from_config import OF_EVERY_TOWER, refuse_unread_keys
from frozen_fast.models.hub import checkpoint_path
from frozen_fast.models.load_model import load_model
from frozen_fast.models.video.video_tower import VideoTower, check_frames


@dataclass(frozen=True)
class FeatureTower:
    """Windows -> one vector each.

    Attributes:
        module: the module with the weights, in eval mode.
        encode: windows [N, T, 3, resolution, resolution] of normalised floats -> [N, D].
        width: D.
        frames: T.
        resolution, mean, std: resolution and normalisation of its frames.
        description: a description, as data that JSON can represent.
    """

    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    width: int
    frames: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: dict[str, Any]


def feature_tower(config: ExperimentConfig, frames: int | None, *, published_pixels: bool = False) -> FeatureTower:
    """Build the video tower of a config's model section, or load the model of its model.checkpoint.

    Args:
        config: an experiment of the dual encoder.
        frames: frames of a window; None: as many as a checkpoint learned, or the tower's usual_frames.
        published_pixels: normalise frames as in the training of the tower's published weights, not by
            data.augmentation.

    Raises:
        UserError: naming the key under model, or --frames.
    """
    if config.model.checkpoint is not None:
        return checkpoint_tower(Path(config.model.checkpoint), frames)
    if config.model.kind != DualEncoder.kind:
        raise UserError(f"model.kind: got {config.model.kind!r} without model.checkpoint; allowed: {DualEncoder.kind}")
    section = with_model_defaults(config.model).video
    kind: type[VideoTower] = video_towers.load(str(section.tower))
    refuse_unread_keys("model.video", section, kind.name, (*OF_EVERY_TOWER, *kind.keys))
    frames = frames or kind.usual_frames
    check_frames(kind, section, [("--frames", frames)])
    tower = kind.from_config(section, max_frames=frames).eval()
    augmentation = config.data.augmentation
    return FeatureTower(
        tower,
        tower,
        tower.width,
        frames,
        tower.resolution,
        tower.mean if published_pixels else augmentation.mean,
        tower.std if published_pixels else augmentation.std,
        {"tower": tower.name, **tower.architecture()},
    )


def checkpoint_tower(path: Path, frames: int | None) -> FeatureTower:
    """Load a dual encoder, whose features are embeddings before normalisation.

    Args:
        path: a checkpoint folder, a run folder, or a file of the released code.
        frames: frames of a window; None: as many as the model learned.

    Raises:
        UserError: the checkpoint cannot be read, is another kind of model, or has not learned that many frames.
    """
    path = checkpoint_path(path)
    model = load_model(path) if path.is_dir() else load_model(path, DualEncoder.kind)
    if not isinstance(model, DualEncoder):
        raise UserError(f"--checkpoint: got a model of kind {model.kind!r}; allowed: {DualEncoder.kind}")
    frames = frames or model.learned_frames
    if frames > model.learned_frames:
        raise UserError(f"--frames: got {frames}; allowed: 1 to {model.learned_frames}, those the model has learned")
    return FeatureTower(
        model,
        lambda windows: model.video_features(windows)["embedding"],
        model.embedding_width,
        frames,
        model.resolution,
        model.mean,
        model.std,
        {"kind": model.kind, **model.architecture()},
    )


def weights_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights and buffers with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
