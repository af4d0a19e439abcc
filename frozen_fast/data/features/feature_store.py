"""The feature store: one safetensors file per expert and per text feature, memory-mapped, and the splits.

    STORE/store.json            format, videos, experts and texts with their widths
    STORE/videos.jsonl          {"id", "captions": [str]} per video, in row order
    STORE/splits/NAME.json      {"videos": [id], "captions": [index or null]}
    STORE/experts/NAME.safetensors   vectors [R, width] float32, ends [V + 1] int64, available [V] uint8
    STORE/text/NAME.safetensors      vectors [R, width] float32, ends [captions + 1] int64, video_ends [V + 1] int64

Video v's vectors of an expert are rows ends[v] to ends[v + 1]; one row each for an expert of one vector per video. A
missing video has available 0 and no rows. Files are memory-mapped, so only pages in use take memory.

Axis letters: V videos of the store, R rows of a file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frozen_fast.common.files import read_json_lines, write_json
from frozen_fast.errors import UserError, unknown_name

STORE_FILE = "store.json"
VIDEOS_FILE = "videos.jsonl"
FORMAT = "frozen_fast.features"
FORMAT_VERSION = 1
ExpertKind = Literal["vector", "set"]

_NAMES: dict[np.dtype[Any], str] = {np.dtype("float32"): "F32", np.dtype("int64"): "I64", np.dtype("uint8"): "U8"}
_TYPES = {name: kind for kind, name in _NAMES.items()}


@dataclass(frozen=True)
class StoredFeature:
    """One expert or text feature of a store.

    Attributes:
        name: as in configs.
        kind: "vector": one per video; "set": any number.
        width: of one vector.
        missing: videos without it.
        origin: the network and settings of frozen-fast extract, with a fingerprint of its weights; None: converted.
    """

    name: str
    kind: ExpertKind
    width: int
    missing: int
    origin: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Split:
    """The videos of one split, in order; captions: index of its caption, None: all."""

    name: str
    videos: tuple[str, ...]
    captions: tuple[int | None, ...]


class FeatureStore:
    """A store on disk, opened for reading; picklable, since files are mapped on first use.

    Attributes:
        folder: its folder.
        experts, texts: name -> StoredFeature.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a store.

        Raises:
            UserError: no store, or one of another version.
        """
        self.folder = Path(folder).expanduser()
        try:
            content = json.loads((self.folder / STORE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"features: got {self.folder}, whose {STORE_FILE} cannot be read ({error})") from None
        if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
            raise UserError(f"features: got {self.folder}; allowed: a folder that frozen-fast wrote")
        self.experts = {name: StoredFeature(name, **entry) for name, entry in content["experts"].items()}
        self.texts = {name: StoredFeature(name, **entry) for name, entry in content["texts"].items()}
        self._maps: dict[Path, dict[str, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "experts": self.experts, "texts": self.texts, "_maps": {}}

    @cached_property
    def captions(self) -> dict[str, tuple[str, ...]]:
        """Video id -> its captions as text, in row order."""
        return {row["id"]: tuple(row["captions"]) for row in read_json_lines(self.folder / VIDEOS_FILE)}

    @cached_property
    def rows(self) -> dict[str, int]:
        """Video id -> row."""
        return {video: row for row, video in enumerate(self.captions)}

    def split(self, name: str) -> Split:
        """A split by name; "" means every video with all its captions.

        Raises:
            UserError: no such split.
        """
        if not name:
            return Split("", tuple(self.captions), (None,) * len(self.captions))
        path = self.folder / "splits" / f"{name}.json"
        if not path.is_file():
            raise unknown_name("split", name, [found.stem for found in path.parent.glob("*.json")])
        content = json.loads(path.read_text(encoding="utf-8"))
        return Split(name, tuple(content["videos"]), tuple(content["captions"]))

    def expert(self, name: str) -> dict[str, np.ndarray]:
        """An expert's arrays, mapped.

        Raises:
            UserError: the store does not contain it.
        """
        if name not in self.experts:
            raise unknown_name("expert", name, self.experts)
        return self._mapped(self.folder / "experts" / f"{name}.safetensors")

    def text(self, name: str) -> dict[str, np.ndarray]:
        """A text feature's arrays, mapped.

        Raises:
            UserError: the store does not contain it.
        """
        if name not in self.texts:
            raise unknown_name("model.experts.text", name, self.texts)
        return self._mapped(self.folder / "text" / f"{name}.safetensors")

    def text_name(self, name: str) -> str:
        """The name, or that of the only text feature if it is empty.

        Raises:
            UserError: the name is empty and there are several.
        """
        if name:
            return name
        if len(self.texts) != 1:
            raise UserError(f"model.experts.text: got none; allowed: {', '.join(self.texts)}")
        return next(iter(self.texts))

    def caption_tokens(self, name: str, video: str) -> list[np.ndarray]:
        """The token features of each of a video's captions, [tokens, width] each."""
        arrays, row = self.text(name), self.rows[video]
        first, last = int(arrays["video_ends"][row]), int(arrays["video_ends"][row + 1])
        ends = arrays["ends"][first : last + 1]
        return [arrays["vectors"][ends[i] : ends[i + 1]] for i in range(last - first)]

    def _mapped(self, path: Path) -> dict[str, np.ndarray]:
        if path not in self._maps:
            self._maps[path] = map_tensors(path)
        return self._maps[path]


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only arrays over the mapped file.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        (length,) = struct.unpack("<Q", whole[:8].tobytes())
        header = json.loads(whole[8 : 8 + length].tobytes())
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                part = whole[8 + length + first : 8 + length + last]
                found[name] = part.view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(f"features: {path} cannot be read ({error})") from None


Rows = Callable[[], Iterator[np.ndarray]]


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], rows: int, width: int, stream: Rows) -> None:
    """Write a safetensors file whose "vectors" [rows, width] are streamed.

    Args:
        path: the file; its folder is made.
        arrays: the small tensors, written whole.
        rows: rows of "vectors".
        width: columns of "vectors".
        stream: called once; yields float32 arrays [any, width] that make up the rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = _entry(array.dtype, array.shape, offset, offset + array.nbytes)
        offset += array.nbytes
    header["vectors"] = _entry(np.dtype("float32"), (rows, width), offset, offset + rows * width * 4)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
        written = 0
        for block in stream():
            file.write(np.ascontiguousarray(block, dtype=np.float32).tobytes())
            written += len(block)
        assert written == rows, f"{written} rows were written instead of {rows}"
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _entry(kind: np.dtype, shape: Sequence[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [first, last]}


def write_expert(
    folder: Path, name: str, kind: ExpertKind, width: int, lengths: Sequence[int | None], stream: Rows
) -> StoredFeature:
    """Write one expert.

    Args:
        folder: the store's.
        name: the expert's.
        kind: one vector per video, or sets.
        width: of one vector.
        lengths: vectors of each of the store's videos; None: missing.
        stream: yields the vectors of the videos that have some, in order.
    """
    available = np.array([length is not None for length in lengths], dtype=np.uint8)
    ends = np.concatenate([[0], np.cumsum([length or 0 for length in lengths], dtype=np.int64)]).astype(np.int64)
    path = folder / "experts" / f"{name}.safetensors"
    write_tensors(path, {"ends": ends, "available": available}, int(ends[-1]), width, stream)
    return StoredFeature(name, kind, width, int((available == 0).sum()))


def write_text(folder: Path, name: str, width: int, lengths: Sequence[Sequence[int]], stream: Rows) -> StoredFeature:
    """Write one text feature; lengths: tokens of each caption of each of the store's videos."""
    flat = [length for video in lengths for length in video]
    ends = np.concatenate([[0], np.cumsum(flat, dtype=np.int64)]).astype(np.int64)
    video_ends = np.concatenate([[0], np.cumsum([len(video) for video in lengths], dtype=np.int64)]).astype(np.int64)
    path = folder / "text" / f"{name}.safetensors"
    write_tensors(path, {"ends": ends, "video_ends": video_ends}, int(ends[-1]), width, stream)
    return StoredFeature(name, "set", width, sum(not video for video in lengths))


def write_store(
    folder: Path,
    captions: Mapping[str, Sequence[str]],
    experts: Sequence[StoredFeature],
    texts: Sequence[StoredFeature],
    splits: Sequence[Split],
) -> None:
    """Write the store's description; store.json is written last, so a store without it is incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{VIDEOS_FILE}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for video, own in captions.items():
            file.write(json.dumps({"id": video, "captions": list(own)}) + "\n")
    temporary.replace(folder / VIDEOS_FILE)
    for split in splits:
        content = {"videos": list(split.videos), "captions": list(split.captions)}
        write_json(folder / "splits" / f"{split.name}.json", content)

    write_contents(folder, len(captions), experts, texts)


def write_contents(folder: Path, videos: int, experts: Iterable[StoredFeature], texts: Iterable[StoredFeature]) -> None:
    """Write store.json: a file of the folder that it does not name does not count."""

    def described(features: Iterable[StoredFeature]) -> dict[str, Any]:
        entries = {one.name: asdict(one) for one in features}
        return {
            name: {key: value for key, value in entry.items() if key != "name" and value is not None}
            for name, entry in entries.items()
        }

    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "videos": videos,
        "experts": described(experts),
        "texts": described(texts),
    }
    write_json(folder / STORE_FILE, content)
