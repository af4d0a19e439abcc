"""frozen_fast: train and use video-text retrieval models of the Frozen-in-Time family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frozen_fast.data.load.video_frames import load_video, transforms
    from frozen_fast.models import DualEncoder
    from frozen_fast.models.load_model import load_model

__version__ = "0.2.0"
__all__ = ["DualEncoder", "__version__", "load_model", "load_video", "transforms"]


def __getattr__(name: str) -> Any:
    """Import models on first use, so that the command line's --help does not wait for torch."""
    if name == "DualEncoder":
        from frozen_fast.models import DualEncoder

        return DualEncoder
    if name == "load_model":
        from frozen_fast.models.load_model import load_model

        return load_model
    if name in ("load_video", "transforms"):
        from frozen_fast.data.load import video_frames

        return getattr(video_frames, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
