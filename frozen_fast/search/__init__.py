"""From a trained model to answers: embed clips, keep their vectors in an index, search it by text or by clip."""

from frozen_fast.errors import UserError

try:
    import faiss  # noqa: F401
    import pyarrow  # noqa: F401
except ImportError as error:
    raise UserError(
        f"frozen_fast.search: got no {error.name}, which it needs; allowed: pip install 'frozen-fast[search]'"
    ) from error

from frozen_fast.search.embed import embed_videos
from frozen_fast.search.index import Hit, Index

__all__ = ["Hit", "Index", "embed_videos"]
