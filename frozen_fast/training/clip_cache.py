"""The embedding cache (evaluation.embedding_cache) for one model and one source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from frozen_fast import __version__
from frozen_fast.config import ExperimentConfig
from frozen_fast.data import Source
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.models.experts.expert_model import ExpertModel
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.parallel.base import Parallel
from frozen_fast.records.embedding_cache import EmbeddingCache, Entry, digest, shrink, weights_digest

EVALUATION_KEYS = ("stride_seconds", "max_windows", "crops", "resize")
"""Keys of the evaluation section on which a clip's input depends."""


@dataclass(frozen=True)
class ClipCache:
    """The cached clips of a source.

    Attributes:
        source: the clips.
        store: their features.
        most_bytes: largest size of the whole cache.
        folder: the whole cache.
    """

    source: Source
    store: EmbeddingCache
    folder: Path
    most_bytes: int

    def key(self, index: int) -> str | None:
        """Return the key of a clip: its file with size and modification time, and its time range; None: no file."""
        clip = self.source.clips[index]
        packed = parse_address(clip.path)
        file = os.path.abspath(clip.path if packed is None else packed.file)
        try:
            state = os.stat(file)
        except OSError:
            return None
        row = None if packed is None else packed.row
        where = [clip.start_seconds, clip.end_seconds, clip.segments]
        return digest([file, row, state.st_size, state.st_mtime_ns, clip.kind, where])

    def find(self, indices: list[int]) -> dict[int, Entry]:
        """Return the cached clips."""
        found = {}
        for index in indices:
            key = self.key(index)
            entry = None if key is None else self.store.get(key)
            if entry is not None:
                found[index] = entry
        return found

    def add(self, entries: Mapping[int, Entry], *, clean: bool) -> None:
        """Add newly encoded clips.

        Args:
            entries: features by index of the clip.
            clean: delete the least recently used entries if the cache is too large; set on one rank only.
        """
        keyed = {index: self.key(index) for index in entries}
        self.store.put({key: entries[index] for index, key in keyed.items() if key is not None})
        if clean:
            shrink(self.folder, self.most_bytes)


def open_clip_cache(
    config: ExperimentConfig, model: RetrievalModel, source: Source, parallel: Parallel, frames: int
) -> ClipCache | None:
    """Open the cache of evaluation.embedding_cache; None if there is none, or if the model reads no frames.

    Entries are keyed by the model's weights and architecture; frames, windows, crops, sampling and the decoder; the
    precision and the kind of device; and the versions of frozen_fast and torch.

    Raises:
        UserError: the folder cannot be used.
    """
    named = config.evaluation.embedding_cache
    if named is None or isinstance(model, ExpertModel):
        return None
    settings = {
        "weights": weights_digest(model.state_dict()),
        "architecture": {"kind": model.kind, **model.architecture()},
        "frames": frames,
        "evaluation": {key: getattr(config.evaluation, key) for key in EVALUATION_KEYS},
        "sampling": asdict(config.data.sampling),
        "decoder": config.data.decode.backend,
        "pixels": [config.data.augmentation.mean, config.data.augmentation.std],
        "kernels": [config.model.video.attention, config.model.video.fused_ops],
        "precision": parallel.precision,
        "device": parallel.device.type,
        "versions": [__version__, torch.__version__],
    }
    folder = Path(named).expanduser()
    store = EmbeddingCache(folder, digest(settings))
    return ClipCache(source, store, folder, int(config.evaluation.embedding_cache_gigabytes * 1e9))
