"""Video and text towers, the models built from them, and their checkpoints."""

from frozen_fast.config.video_sizes import VIDEO_SIZES, VideoSize
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.from_config import build_dual_encoder, check_model
from frozen_fast.models.text.text_tower import TextTower
from frozen_fast.models.text.tokenizer import Tokenizer
from frozen_fast.models.text.transformers_tower import TransformersTower
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.temporal import expand_temporal_embedding
from frozen_fast.models.video.video_tower import VideoTower
from frozen_fast.models.video.vit_weights import load_vit_weights

__all__ = [
    "VIDEO_SIZES",
    "DualEncoder",
    "SpaceTimeTransformer",
    "TextTower",
    "Tokenizer",
    "TransformersTower",
    "VideoSize",
    "VideoTower",
    "build_dual_encoder",
    "check_model",
    "expand_temporal_embedding",
    "load_vit_weights",
]
