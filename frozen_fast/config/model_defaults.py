"""What the keys under `model` mean where a config does not set them: defaults, or what a checkpoint says.

A key whose default is none here is one that a checkpoint describes too. It stays none with model.checkpoint, so that a
value that was set can be told from one that was not, and a contradiction refused. Without a checkpoint it is filled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frozen_fast.config.schema import ModelConfig

VIDEO_TOWER = "space_time"
TEXT_TOWER = "transformers"
TEXT_NAME = "distilbert-base-uncased"
_MODEL = {"embedding_width": 256, "text_activation": "relu"}
_VIDEO: dict[str, dict[str, Any]] = {
    "space_time": {"size": "base_patch16_224", "block": "frozen_in_time", "skip_time_attention_at_one_frame": False},
    "timm": {"over_time": "mean"},
    "clip": {"over_time": "mean"},
    "siglip": {"over_time": "mean"},
}
_TEXT = {"transformers": {"name": TEXT_NAME}}


def with_model_defaults(model: ModelConfig) -> ModelConfig:
    """Fill the keys that a checkpoint would fill; a config with model.checkpoint is returned as it is."""
    if model.checkpoint is not None:
        return model
    video = _filled(model.video, {"tower": VIDEO_TOWER})
    video = _filled(video, _VIDEO.get(str(video.tower), {}))
    if video.over_time == "transformer":
        video = _filled(video, {"time_layers": 4 if video.tower in ("clip", "siglip") else 2})
    text = _filled(model.text, {"tower": TEXT_TOWER})
    text = _filled(text, _TEXT.get(str(text.tower), {}))
    return _filled(replace(model, video=video, text=text), _MODEL)


def _filled(section: Any, values: dict[str, Any]) -> Any:
    return replace(section, **{key: value for key, value in values.items() if getattr(section, key) is None})
