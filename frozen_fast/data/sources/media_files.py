"""Finds a clip's file by its id anywhere below a folder, with any suffix."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from frozen_fast.data.sources.annotation_files import folder_with

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".3gp", ".flv", ".gif", ".wmv"})


class MediaFiles:
    """The files below a data set's media folder by name, listed once.

    A file is found by its name and, if it has a video suffix, by its name without the suffix. If two files share a name
    without suffix, the first in the order of their paths is used.
    """

    def __init__(self, root: Path, folders: Iterable[str], key: str) -> None:
        """List the files.

        Args:
            root: the data set's folder.
            folders: candidates below it; the first that exists is read.
            key: the source's config key, for the error.

        Raises:
            MissingFileError: none of the folders exists.
        """
        self.folder = folder_with(root, folders, ".", key)
        self._paths: dict[str, str] = {}
        for folder, inner, names in os.walk(self.folder, followlinks=True):
            inner.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                stem, suffix = os.path.splitext(name)
                self._paths.setdefault(name, path)
                if suffix.lower() in VIDEO_SUFFIXES:
                    self._paths.setdefault(stem, path)

    def path(self, *names: str) -> str:
        """Return the file of the first name that has one, otherwise a path that does not exist."""
        for name in names:
            if name in self._paths:
                return self._paths[name]
        return str(self.folder / names[0])
