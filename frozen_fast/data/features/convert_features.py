"""Converts the released structured-symlinks layout to a feature store, one array at a time.

ROOT/aggregated_<type>_<fps>fps_<px>px_stride<s>_offset<o>[_inner_stride<i>]/<model>-<aggregation>.pickle
ROOT/aggregated_audio*/, aggregated_face*/, aggregated_ocr*/, aggregated_speech*/*.pickle
ROOT/aggregated_text_feats/<name>.pkl            {video: [tokens x width per caption]}
ROOT/raw-captions*.pkl                           {video: [[word, ..], ..]}
ROOT/<list>.txt                                  video ids, one per line
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frozen_fast.data.features.feature_pickle import ArrayInFile, LazyBytes, is_missing, open_feature_pickle
from frozen_fast.data.features.feature_store import (
    ExpertKind,
    Split,
    StoredFeature,
    write_expert,
    write_store,
    write_text,
)
from frozen_fast.errors import UserError, some

log = logging.getLogger(__name__)

PLAIN_EXPERTS: dict[str, tuple[str, ...]] = {
    "audio": ("aggregated_audio*/*.pickle", "aggregated_audio*/*.pkl", "antoine/audio_features.pickle"),
    "face": ("aggregated_face*/*.pickle", "aggregated_face*/*.pkl", "antoine/face*.pickle"),
    "ocr": ("aggregated_ocr*/*.pickle", "aggregated_ocr*/*.pkl"),
    "speech": ("aggregated_speech*/*.pickle", "aggregated_speech*/*.pkl"),
    "antoine-rgb": ("antoine/resnet_features.pickle",),
    "flow": ("antoine/flow_features.pickle",),
}
"""Experts without a type.model.number name -> where their pickles are, the first match is used."""

SET_EXPERTS = ("audio", "ocr", "speech")
TEXT_FOLDER = "aggregated_text_feats"
CAPTIONS_FILES = "raw-captions*.pkl"
OTHER_NAMES = "dict_youtube_mapping.pkl"
"""Video id -> the name that some pickles use for it."""

ONE_CAPTION_FILES = {"val_list_jsfusion": "jsfusion_val_caption_idx.pkl"}
"""Split list -> the file that selects one caption for each of its videos."""


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion."""

    videos: int
    experts: tuple[StoredFeature, ...]
    texts: tuple[StoredFeature, ...]
    splits: tuple[Split, ...]


def convert_features(
    root: Path,
    store: Path,
    experts: Sequence[str],
    texts: Sequence[str],
    *,
    files: Mapping[str, Path] | None = None,
) -> Conversion:
    """Convert a released data set.

    Args:
        root: the structured-symlinks folder.
        store: output folder.
        experts: names, such as imagenet.senet154.0 and ocr.
        texts: names of text features; the store contains the videos of the first.
        files: expert or text name -> its pickle, if the layout's rule does not find it.

    Raises:
        UserError: a file is missing, ambiguous or damaged, or features differ in width.
    """
    files = files or {}
    if not experts or not texts:
        raise UserError("convert-features: got no experts or no text features; allowed: at least one of each")
    text_entries = _text_entries(root, texts[0], files)
    captions = _captions(root, text_entries)
    videos = list(captions)
    stored_texts = [
        _write_text(store, name, text_entries if index == 0 else _text_entries(root, name, files), videos)
        for index, name in enumerate(texts)
    ]
    paths = {name: files.get(name) or find_expert(root, name) for name in experts}
    stored_experts = [_write_expert(store, name, path, videos) for name, path in paths.items()]
    splits = _splits(root, set(videos))
    write_store(store, captions, stored_experts, stored_texts, splits)
    return Conversion(len(videos), tuple(stored_experts), tuple(stored_texts), tuple(splits))


def find_expert(root: Path, name: str) -> Path:
    """Find an expert's pickle in the layout.

    Raises:
        UserError: there is none, or more than one.
    """
    parts = name.split(".")
    if name in PLAIN_EXPERTS:
        patterns: Sequence[str] = PLAIN_EXPERTS[name]
    elif len(parts) == 3:
        patterns = (f"aggregated_{parts[0].replace('-', '_')}_*/{parts[1]}-avg.pickle",)
    else:
        raise UserError(f"expert: got {name!r}; allowed: type.model.number, or {', '.join(PLAIN_EXPERTS)}")
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise UserError(f"expert: {name} is at {some([str(path) for path in found])}; allowed: --file {name}=FILE")
        if found:
            return found[0]
    raise UserError(f"expert: {name} matches none of {', '.join(patterns)} in {root}; allowed: --file {name}=FILE")


def find_text(root: Path, name: str) -> list[Path]:
    """Find a text feature's pickles in the layout: one file, or one for each split.

    Raises:
        UserError: there is none.
    """
    folder = root / TEXT_FOLDER
    special = [*sorted(folder.glob("w2v_*_openAIGPT.pickle"))] if name == "openai" else []
    for path in (folder / f"{name}.pkl", folder / f"{name}.pickle", *special):
        if path.is_file():
            return [path]
    ends = ("train*", "val*", "test*", "caption-*")
    parts = [path for end in ends for path in sorted(folder.glob(f"{name}-{end}.pkl"))]
    if parts:
        return parts
    raise UserError(f"text features: {name} is not in {folder}; allowed: --file {name}=FILE")


def _text_entries(root: Path, name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """A text feature's entries of all splits, under the videos' ids (MSVD keeps some under other names)."""
    entries: dict[str, Any] = {}
    for path in [files[name]] if name in files else find_text(root, name):
        entries.update(open_feature_pickle(path))
    names = root / OTHER_NAMES
    if names.is_file():
        video_of = {str(other): video for video, other in open_feature_pickle(names).items()}
        entries = {video_of.get(video, video): entry for video, entry in entries.items()}
    return entries


def _captions(root: Path, text_entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """Video -> captions as text, for the videos with text features."""
    words: dict[str, Any] = {}
    for path in sorted(root.glob(CAPTIONS_FILES)):
        words.update(open_feature_pickle(path))
    found: dict[str, list[str]] = {}
    for video, entry in text_entries.items():
        own = words.get(video)
        number = len(_caption_arrays(entry))
        texts = [_joined(caption) for caption in own] if isinstance(own, (list, tuple)) else []
        if len(texts) < number:
            texts += [""] * (number - len(texts))
        found[video] = texts[:number]
    return found


def _joined(caption: Any) -> str:
    if isinstance(caption, (list, tuple)):
        return " ".join(_joined(word) for word in caption)
    return caption.read().decode("utf-8", "replace") if isinstance(caption, LazyBytes) else str(caption)


def _caption_arrays(entry: Any) -> list[ArrayInFile]:
    """The arrays of a video's captions."""
    if is_missing(entry):
        return []
    items = entry.items if isinstance(entry, ArrayInFile) and entry.items is not None else entry
    arrays = items if isinstance(items, (list, tuple)) else [items]
    kept: list[ArrayInFile] = []
    for array in arrays:
        if not isinstance(array, ArrayInFile) or len(array.shape) not in (2, 3):
            raise UserError(f"text features: got {type(array).__name__}; allowed: arrays [tokens, width] per caption")
        kept.append(array)
    return kept


def _write_text(store: Path, name: str, entries: Mapping[str, Any], videos: Sequence[str]) -> StoredFeature:
    """One text feature; captions of a video in the file's order."""
    lacking = [video for video in videos if video not in entries]
    if lacking:
        raise UserError(f"text features: {name} lacks {some(lacking)}; allowed: the videos of the first text features")
    arrays = {video: _caption_arrays(entries[video]) for video in videos}
    width = _one_width((array for own in arrays.values() for array in own), name)

    def stream() -> Iterator[np.ndarray]:
        for video in videos:
            for array in arrays[video]:
                yield array.read().reshape(-1, width)

    lengths = [[_length(array) for array in arrays[video]] for video in videos]
    return write_text(store, name, width, lengths, stream)


def _write_expert(store: Path, name: str, path: Path, videos: Sequence[str]) -> StoredFeature:
    """One expert: vectors, or sets of them; videos that the file lacks are missing."""
    entries = open_feature_pickle(path)
    arrays: list[ArrayInFile | None] = []
    for video in videos:
        entry = entries.get(video)
        if is_missing(entry):
            arrays.append(None)
        elif isinstance(entry, ArrayInFile):
            arrays.append(entry)
        else:
            raise UserError(f"{path}: {video} is a {type(entry).__name__}; allowed: an array, or NaN where missing")
    absent = sum(video not in entries for video in videos)
    if absent:
        log.warning("%s: %d of %d videos are not in the file and count as missing", path, absent, len(videos))
    present = [array for array in arrays if array is not None]
    width = _one_width(present, path)
    kind: ExpertKind = "set" if name in SET_EXPERTS or any(_length(array) != 1 for array in present) else "vector"

    def stream() -> Iterator[np.ndarray]:
        for array in present:
            yield array.read().reshape(-1, width)

    lengths = [None if array is None else _length(array) for array in arrays]
    return write_expert(store, name, kind, width, lengths, stream)


def _length(array: ArrayInFile) -> int:
    """Vectors in an array; an empty one has none, whatever its other axes say."""
    return 0 if 0 in array.shape else int(np.prod(array.shape[:-1]))


def _one_width(arrays: Iterator[ArrayInFile] | Sequence[ArrayInFile], what: Path | str) -> int:
    """The last axis's size, the same for all."""
    widths = {array.shape[-1] for array in arrays if _length(array)}
    if len(widths) != 1:
        raise UserError(f"{what}: got features of widths {sorted(widths)}; allowed: one width")
    return widths.pop()


def _splits(root: Path, videos: set[str]) -> list[Split]:
    """Read every .txt of the root as a split; videos without text features are dropped and counted."""
    splits = []
    for path in sorted(root.glob("*.txt")):
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        own = [video if video in videos else video.split(".")[0] for video in listed]
        kept = [video for video in own if video in videos]
        if len(kept) < len(own):
            log.warning("%s: %d of %d videos have no text features", path, len(own) - len(kept), len(own))
        index = root / ONE_CAPTION_FILES[path.stem] if path.stem in ONE_CAPTION_FILES else None
        chosen = open_feature_pickle(index) if index is not None and index.is_file() else {}
        splits.append(Split(path.stem, tuple(kept), tuple(chosen.get(video) for video in kept)))
    return splits
