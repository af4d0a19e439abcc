"""Synthetic feature sets in the released structured-symlinks layout."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDERS = {
    "face": ("aggregated_face_feats", "facefeats-avg.pickle"),
    "audio": ("aggregated_audio_feats", "Audio_MSRVTT_new.pickle"),
    "ocr": ("aggregated_ocr_feats", "ocr-raw.pickle"),
    "speech": ("aggregated_speech", "speech-w2v.pickle"),
    "i3d.i3d.0": ("aggregated_i3d_25fps_256px_stride25_offset0_inner_stride1", "i3d-avg.pickle"),
    "scene.densenet161.0": ("aggregated_scene_25fps_256px_stride1_offset0", "densenet161-avg.pickle"),
}


def planted_features(
    videos: Sequence[str],
    experts: Mapping[str, tuple[int, bool]],
    *,
    text_width: int,
    captions: int = 3,
    seed: int = 0,
    missing: float = 0.1,
    noise: float = 0.3,
    hidden: int = 16,
    wrong_captions: float = 0.0,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[np.ndarray]], dict[str, list[list[str]]]]:
    """Features that a video's captions share a hidden vector with.

    Args:
        videos: ids.
        experts: name -> (width, whether it is a set of vectors per video).
        text_width: of a token.
        captions: per video.
        seed: of everything.
        missing: share of videos that lack an expert (never the first).
        noise: spread of what is added to each expert's and caption's view of the hidden vector.
        hidden: width of the hidden vector.
        wrong_captions: share of captions that tell of another video.

    Returns:
        (expert -> video -> array or NaN, video -> [tokens x width], video -> [[word]]).
    """
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(len(videos), hidden))
    maps = {name: rng.normal(size=(hidden, width)) / 4 for name, (width, _) in experts.items()}
    text_map = rng.normal(size=(hidden, text_width)) / 4
    features: dict[str, dict[str, Any]] = {name: {} for name in experts}
    texts: dict[str, list[np.ndarray]] = {}
    words: dict[str, list[list[str]]] = {}
    for row, video in enumerate(videos):
        for number, (name, (width, is_set)) in enumerate(experts.items()):
            if number and rng.random() < missing:
                features[name][video] = float("nan")
                continue
            size = int(rng.integers(1, 6)) if is_set else 1
            x = meaning[row] @ maps[name] + noise * rng.normal(size=(size, width))
            features[name][video] = (x if is_set else x[0]).astype(np.float32)
        texts[video], words[video] = [], []
        for number in range(captions):
            told = int(rng.integers(len(videos))) if rng.random() < wrong_captions else row
            size = int(rng.integers(3, 8))
            tokens = meaning[told] @ text_map + noise * rng.normal(size=(size, text_width))
            texts[video].append(tokens.astype(np.float32))
            words[video].append(["caption", str(number), "of", videos[told]])
    return features, texts, words


def write_released_layout(
    root: Path,
    features: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, Mapping[str, list[np.ndarray]]],
    words: Mapping[str, list[list[str]]],
    splits: Mapping[str, Sequence[str]],
    *,
    protocol: int = 4,
) -> Path:
    """Write the pickles and lists of a released data set."""
    for name, entries in features.items():
        folder, file = FOLDERS[name]
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file).write_bytes(pickle.dumps(dict(entries), protocol=protocol))
    (root / "aggregated_text_feats").mkdir(parents=True, exist_ok=True)
    for name, entries in texts.items():
        (root / "aggregated_text_feats" / f"{name}.pkl").write_bytes(pickle.dumps(dict(entries), protocol=protocol))
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(dict(words), protocol=protocol))
    for name, videos in splits.items():
        (root / f"{name}.txt").write_text("\n".join(videos) + "\n", encoding="utf-8")
    return root
