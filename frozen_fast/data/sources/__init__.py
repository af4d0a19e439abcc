"""Sources: collections of clips with captions, read from data set layouts on disk."""

from frozen_fast.data.sources.captions import CaptionRule
from frozen_fast.data.sources.clip import Clip, PackedClips, Source
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.read import read_source, read_sources
from frozen_fast.data.sources.twins import twin_pairs

__all__ = ["CaptionRule", "Clip", "Layout", "PackedClips", "Source", "read_source", "read_sources", "twin_pairs"]
