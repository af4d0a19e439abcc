"""What the table of layouts (frozen_fast.config.extensions.layouts) holds: one data set in one form on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector
from frozen_fast.data.sources.clip import Clip
from frozen_fast.errors import UserError, unknown_name

Reader = Callable[[SourceConfig, str, ClipCollector], Iterator[Clip]]
"""(source, its config key for messages, where rows that are left out are counted) -> clips in the annotation's order.

A clip that the annotation names and whose file or caption is missing is yielded all the same: read_source counts it.
"""

Published = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Version (data.sources[].split_version) -> split -> numbers of clips that are published for it; empty: none is.

A data set without versions has the version "". Two numbers where two sets of files are in use under one name.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One data set in one form on disk.

    Attributes:
        data_set: its name, for messages.
        read: reads the annotation.
        published: versions, splits and their numbers of clips; None: the reader checks version and split itself.
        get_from: where its files come from, told when one is missing.
    """

    data_set: str
    read: Reader
    published: Published | None = None
    get_from: str = ""

    def check_choice(self, source: SourceConfig, key: str) -> None:
        """Refuse a version or a split that the data set does not have.

        Raises:
            UserError: naming the key, the value and what is allowed.
        """
        versions = {"": {}} if self.published is None else self.published
        if source.split_version not in versions:
            if set(versions) == {""}:
                allowed = f"nothing, format {source.format} has splits of one version"
                raise UserError(f"{key}.split_version: got {source.split_version!r}; allowed: {allowed}")
            raise unknown_name(f"{key}.split_version", source.split_version, versions)
        if self.published is not None and source.split not in versions[source.split_version]:
            raise unknown_name(f"{key}.split", source.split, versions[source.split_version])

    def expected(self, source: SourceConfig) -> tuple[int, ...]:
        """The published numbers of clips of the chosen version and split; empty where none is."""
        return () if self.published is None else self.published[source.split_version][source.split]
