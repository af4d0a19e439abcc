"""Video and text towers, the dual encoder that joins them, and its checkpoints."""

from frozen_fast.models.build import build_dual_encoder
from frozen_fast.models.checkpoint import load_weights, save_pretrained
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.space_time import VIDEO_SIZES, SpaceTimeTransformer, VideoSize
from frozen_fast.models.temporal import expand_temporal_embedding
from frozen_fast.models.text import TextTower
from frozen_fast.models.tokenizer import Tokenizer
from frozen_fast.models.vit_weights import load_vit_weights

__all__ = [
    "VIDEO_SIZES",
    "DualEncoder",
    "SpaceTimeTransformer",
    "TextTower",
    "Tokenizer",
    "VideoSize",
    "build_dual_encoder",
    "expand_temporal_embedding",
    "load_vit_weights",
    "load_weights",
    "save_pretrained",
]
