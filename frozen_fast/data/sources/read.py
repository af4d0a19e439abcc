"""From a source's config to its clips: the table of formats, and the checks that all formats share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector
from frozen_fast.data.sources.captions import CaptionRule
from frozen_fast.data.sources.cc3m import read_cc3m
from frozen_fast.data.sources.clip import Clip, Kind, PackedClips, Source
from frozen_fast.data.sources.manifest import read_manifest
from frozen_fast.data.sources.msrvtt import read_msrvtt, read_msrvtt_clip4clip
from frozen_fast.data.sources.packed_shards import read_shards
from frozen_fast.data.sources.webvid import read_webvid
from frozen_fast.errors import UserError, unknown_name

logger = logging.getLogger(__name__)

Reader = Callable[[SourceConfig, str, ClipCollector], Iterator[Clip]]

FORMATS: dict[str, Reader] = {
    "manifest": read_manifest,
    "webvid": read_webvid,
    "cc3m": read_cc3m,
    "msrvtt": read_msrvtt,
    "msrvtt_clip4clip": read_msrvtt_clip4clip,
    "shards": read_shards,
}


def read_source(config: SourceConfig, key: str = "source") -> Source:
    """Read one source's metadata and check that its files are there.

    Args:
        config: the source.
        key: the config key that error messages name, such as "data.sources[0]".

    Raises:
        UserError: a folder, metadata file or column is missing, a manifest line is wrong, or no clip is left.
    """
    if config.format not in FORMATS:
        raise unknown_name(f"{key}.format", config.format, FORMATS)
    if not config.path:
        raise UserError(f"{key}.path: got nothing; allowed: a manifest file, a data set's folder, or packed shards")
    name = config.name or config.format
    collector = ClipCollector()
    kinds: Counter[Kind] = Counter()

    def kept() -> Iterator[Clip]:
        for clip in FORMATS[config.format](config, key, collector):
            if collector.keep(clip):
                kinds[clip.kind] += 1
                yield clip

    clips = PackedClips(islice(kept(), config.max_clips or None))
    collector.log(name, len(clips))
    if not clips:
        causes = ", ".join(f"{cause}: {count}" for cause, count in collector.drops.items()) or "no rows"
        raise UserError(f"{key}: no clip is left of {config.path!r} ({causes}); allowed: at least one readable row")
    rule = CaptionRule(config.captions, config.max_caption_characters)
    held = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kinds.items(), reverse=True))
    logger.info("source %s: %d clips (%s: %s)", name, len(clips), config.format, held)
    whole: Kind = "video" if kinds["video"] else "image"
    return Source(name, config.format, clips, whole, rule, dict(collector.drops))


def read_sources(configs: Sequence[SourceConfig], key: str = "data.sources") -> dict[str, Source]:
    """Read several sources, by name in their order; two of the same name are a UserError."""
    names = [config.name or config.format for config in configs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"{key}[{index}].name: got {name!r} twice; allowed: a name for each source")
    return {
        name: read_source(config, f"{key}[{index}]")
        for index, (name, config) in enumerate(zip(names, configs, strict=True))
    }
