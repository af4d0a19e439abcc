"""Layout: the interface of data set layouts (frozen_fast.config.extensions.layouts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector
from frozen_fast.data.sources.clip import Clip
from frozen_fast.errors import UserError, unknown_name

Reader = Callable[[SourceConfig, str, ClipCollector], Iterator[Clip]]
"""(source, its config key for messages, collector of dropped rows) -> clips in the annotation's order.

Also yields clips without a file or caption; read_source counts and drops them.
"""

Published = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Version (data.sources[].split_version) -> split -> published numbers of clips; empty: not published.

A data set without versions has the version "". Two numbers if two sets of files have the same name.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A data set in one form on disk.

    Attributes:
        data_set: its name, for messages.
        read: reads the annotation.
        published: versions, splits and their numbers of clips; None: the reader checks version and split itself.
        get_from: origin of its files, for errors about missing files.
    """

    data_set: str
    read: Reader
    published: Published | None = None
    get_from: str = ""

    def check_choice(self, source: SourceConfig, key: str) -> None:
        """Check that the data set has the version and the split.

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
        """The published numbers of clips of the version and split; empty if not published."""
        return () if self.published is None else self.published[source.split_version][source.split]
