"""Search: embed clips, store their vectors in an index, and search it by a text or a clip."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from frozen_fast.errors import UserError

if TYPE_CHECKING:
    from frozen_fast.search.embed import embed_videos
    from frozen_fast.search.index import Hit, Index

__all__ = ["Hit", "Index", "embed_videos"]


def __getattr__(name: str) -> Any:
    """Import on first use: embed_videos needs none of the packages that an index does."""
    if name == "embed_videos":
        from frozen_fast.search.embed import embed_videos

        return embed_videos
    if name in ("Hit", "Index"):
        check_packages()
        from frozen_fast.search import index

        return getattr(index, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_packages() -> None:
    """Check that the packages for indexes are installed.

    Raises:
        UserError: naming the first that is missing.
    """
    for package in ("faiss", "pyarrow"):
        if find_spec(package) is None:
            raise UserError(f"frozen_fast.search: needs the package {package}; install it: pip install -e '.[search]'")
