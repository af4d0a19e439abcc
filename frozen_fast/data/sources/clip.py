"""Clip and Source, a collection of clips with captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import torch

from frozen_fast.data.sources.captions import CaptionRule

Kind = Literal["video", "image"]


@dataclass(frozen=True, slots=True)
class Clip:
    """One example: a part of a video file, or a picture, with its captions.

    Attributes:
        id: unique in its source.
        path: the file.
        captions: at least one.
        kind: "video" or "image".
        start_seconds: start of the clip in the file; None: the beginning.
        end_seconds: end of the clip, exclusive; None: the end of the file.
        split: the data set's name of the split, such as train, val or test; empty without splits.
        twin: id of a clip that a single frame cannot distinguish from this one (such as its reverse).
        label: class of an action recognition data set, as words ("brush hair"); None: the data set has no classes.
        segments: disjoint parts of the file, (start, end) in seconds, in order; the clip is their concatenation.
            Empty: the clip is start_seconds to end_seconds.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    kind: Kind = "video"
    start_seconds: float | None = None
    end_seconds: float | None = None
    split: str = ""
    twin: str | None = None
    label: str | None = None
    segments: tuple[tuple[float, float], ...] = ()


class PackedClips(Sequence[Clip]):
    """A list of clips stored in two tensors, for millions of clips.

    A loader process gets the tensors through shared memory, so a source is stored once per rank, not
    once per worker. Items are unpacked on access, in some microseconds.
    """

    def __init__(self, clips: Iterable[Clip]) -> None:
        packed, ends = bytearray(), [0]
        for clip in clips:
            values = [getattr(clip, name) for name in Clip.__slots__]
            packed += json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
            ends.append(len(packed))
        self._bytes = torch.empty(len(packed), dtype=torch.uint8)
        if packed:
            self._bytes.copy_(torch.frombuffer(packed, dtype=torch.uint8))
        self._ends = torch.tensor(ends, dtype=torch.int64)
        self._make_views()

    def _make_views(self) -> None:
        """Create views of the tensors' memory, which are ten times as fast to slice as tensors."""
        self._bytes_view, self._ends_view = self._bytes.numpy().data, self._ends.numpy().data

    def __getstate__(self) -> dict[str, torch.Tensor]:
        if not self._bytes.is_shared():
            # Copies, because moving a tensor into shared memory frees the memory that the views read.
            self._bytes, self._ends = self._bytes.clone().share_memory_(), self._ends.clone().share_memory_()
            self._make_views()
        return {"bytes": self._bytes, "ends": self._ends}

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self._bytes, self._ends = state["bytes"], state["ends"]
        self._make_views()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Clip: ...

    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...

    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        place = index % len(self)
        packed = self._bytes_view[self._ends_view[place] : self._ends_view[place + 1]]
        text = packed.tobytes().decode("utf-8", "surrogatepass")
        values = dict(zip(Clip.__slots__, json.loads(text), strict=True))
        values["captions"] = tuple(values["captions"])
        values["segments"] = tuple((start, end) for start, end in values["segments"])
        return Clip(**values)


@dataclass(frozen=True)
class Source:
    """A collection of clips: videos, pictures, or videos with pictures among them.

    Attributes:
        name: in configs, steps.jsonl and reports.
        format: name of its layout.
        clips: in the order of the metadata; never empty.
        kind: "image" if all clips are pictures, which have one frame in every stage. Otherwise "video": a batch
            has the stage's number of frames, and a picture repeats its frame.
        caption_rule: how captions are selected and truncated.
        drops: cause -> number of dropped rows.
        classes: class names in the order of the data set's own list, else sorted; empty without classes.
        published: number of clips that the data set's authors state for this split; None: not stated, or not checked.
    """

    name: str
    format: str
    clips: Sequence[Clip]
    kind: Kind = "video"
    caption_rule: CaptionRule = field(default_factory=CaptionRule)
    drops: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    published: int | None = None

    def __len__(self) -> int:
        return len(self.clips)
