"""A feature store as a source: videos with features and captions, without frames."""

from __future__ import annotations

from collections.abc import Iterator

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.features.feature_store import FeatureStore
from frozen_fast.data.sources.annotation_files import ClipCollector
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout


def read_features(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Videos of a store's split (the name of a released list, such as train_list_full; empty: all), in its order."""
    store = FeatureStore(config.path)
    split = store.split(config.split)
    for video, chosen in zip(split.videos, split.captions, strict=True):
        own = store.captions[video]
        captions = own if chosen is None else own[chosen : chosen + 1]
        yield Clip(id=video, path=str(store.folder), captions=captions, split=config.split)


FEATURES = Layout(data_set="a feature store", read=read_features, get_from="frozen-fast convert-features")
