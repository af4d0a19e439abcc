"""Reads a source with its layout's reader, and checks it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from frozen_fast.config.extensions import layouts
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, MissingFileError
from frozen_fast.data.sources.captions import CaptionRule
from frozen_fast.data.sources.clip import Clip, Kind, PackedClips, Source
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.errors import UserError

logger = logging.getLogger(__name__)


def read_source(config: SourceConfig, key: str = "source") -> Source:
    """Read one source's metadata and check that its files exist.

    Args:
        config: the source.
        key: the config key for messages, such as "data.sources[0]".

    Raises:
        UserError: a folder, metadata file or column is missing (the message names its origin), a version or split
            is unknown, an annotation is malformed, the number of clips differs from the published
            one with split_counts "error", or no clip remains.
    """
    layout: Layout = layouts.load(config.format, f"{key}.format")
    if not config.path:
        raise UserError(f"{key}.path: got nothing; allowed: a manifest file, a data set's folder, or packed shards")
    layout.check_choice(config, key)
    name = config.name or config.format
    collector = ClipCollector()
    kinds: Counter[Kind] = Counter()
    labels: set[str] = set()

    def kept() -> Iterator[Clip]:
        for clip in layout.read(config, key, collector):
            if collector.keep(clip):
                kinds[clip.kind] += 1
                if clip.label is not None:
                    labels.add(clip.label)
                yield clip

    try:
        clips = PackedClips(islice(kept(), config.max_clips or None))
    except MissingFileError as error:
        raise UserError(f"{error}{f' ({layout.get_from})' if layout.get_from else ''}") from None
    collector.log(name, len(clips))
    published = _check_count(config, key, layout, collector)
    if not clips:
        causes = ", ".join(f"{cause}: {count}" for cause, count in collector.drops.items()) or "no rows"
        raise UserError(f"{key}: no clip remains of {config.path!r} ({causes}); allowed: at least one usable row")
    rule = CaptionRule(config.captions, config.max_caption_characters)
    held = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kinds.items(), reverse=True))
    logger.info("source %s: %d clips (%s: %s)", name, len(clips), config.format, held)
    return Source(
        name=name,
        format=config.format,
        clips=clips,
        kind="video" if kinds["video"] else "image",
        caption_rule=rule,
        drops=dict(collector.drops),
        classes=tuple(sorted(labels | set(collector.classes))) if labels else (),
        published=published,
    )


def _check_count(config: SourceConfig, key: str, layout: Layout, collector: ClipCollector) -> int | None:
    """Compare the number of clips in the annotation with the published one; return that, if there is one."""
    expected = layout.expected(config)
    if not expected or config.max_clips or config.split_counts == "off":
        return None
    if collector.listed not in expected:
        numbers = " or ".join(f"{count:,}" for count in expected)
        version = f" {config.split_version}" if config.split_version else ""
        found = f"{layout.data_set}{version}, split {config.split}: the annotation names {collector.listed:,} clips"
        message = f"{found}; {numbers} are published"
        if config.split_counts == "error":
            raise UserError(f"{key}.split_counts: {message}; allowed: the published files, or split_counts=warn")
        logger.warning("source %s: %s", config.name or config.format, message)
    return min(expected, key=lambda count: abs(count - collector.listed))


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
