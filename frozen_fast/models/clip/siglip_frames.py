"""Video tower: SigLIP's image tower on each frame; frames are combined as in clip_frames."""

from __future__ import annotations

from frozen_fast.models.clip.clip_frames import ClipFrames
from frozen_fast.models.clip.siglip_towers import SIGLIP_MEAN, SIGLIP_SIZES, SIGLIP_STD, SiglipImageTower, SiglipSize
from frozen_fast.models.clip.siglip_weights import SiglipWeights, read_siglip


class SiglipFrames(ClipFrames):
    """SigLIP's image tower on each frame, then the mean of normalised frame embeddings or a transformer over them."""

    name = "siglip"
    mean, std = SIGLIP_MEAN, SIGLIP_STD
    sizes = SIGLIP_SIZES
    size_class = SiglipSize
    image_tower = SiglipImageTower

    @staticmethod
    def read(source: str) -> SiglipWeights:
        """See siglip_weights.read_siglip."""
        return read_siglip(source)
