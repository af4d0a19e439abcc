"""Counts of unreadable clips, and the limit on their share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frozen_fast.errors import UserError

MINIMUM_CLIPS = 50


@dataclass(frozen=True)
class BadClip:
    """One clip that could not be read.

    Attributes:
        source: name of its source.
        clip_id: its id there.
        path: its file.
        cause: one of frozen_fast.data.decode.Cause.
        message: one line.
        replaced_by: id of the clip that replaced it; None in evaluation, which replaces no clips.
    """

    source: str
    clip_id: str
    path: str
    cause: str
    message: str
    replaced_by: str | None = None


class BadClipLedger:
    """Counts the bad clips of a run and writes bad_clips.jsonl.

    With several ranks, gather every rank's bad clips first (frozen_fast.common.ranks.gather_objects) and record them
    on all ranks, with a writer on rank 0 only. All ranks then have the same counts.

    Attributes:
        clips: number of readable clips so far.
        causes: cause -> number of bad clips.
    """

    def __init__(
        self,
        write: Callable[[Sequence[dict[str, Any]]], None] | None,
        max_share: float,
        *,
        minimum_clips: int = MINIMUM_CLIPS,
    ) -> None:
        """Start with zero counts.

        Args:
            write: appends rows to bad_clips.jsonl; None: write nothing.
            max_share: largest allowed share of bad clips among all clips.
            minimum_clips: number of clips to read before the share is checked.
        """
        self.clips = 0
        self.causes: Counter[str] = Counter()
        self._write = write
        self._max_share = max_share
        self._minimum_clips = minimum_clips
        self._last = ""

    @property
    def bad(self) -> int:
        """Bad clips so far."""
        return self.causes.total()

    @property
    def share(self) -> float:
        """Share of bad clips among all clips so far; 0 at the start."""
        tried = self.clips + self.bad
        return self.bad / tried if tried else 0.0

    def record(self, step: int, clips: int, bad_clips: Sequence[BadClip]) -> None:
        """Add one step: the number of readable clips, and the bad clips."""
        self.clips += clips
        for bad in bad_clips:
            self.causes[bad.cause] += 1
            self._last = f"; the last: {bad.path}: {bad.message}"
        if self._write is not None and bad_clips:
            self._write([{"step": step, **asdict(bad)} for bad in bad_clips])

    def check(self, *, final: bool = False) -> None:
        """Raise a UserError if the share exceeds the limit, once minimum_clips were read or the run is over."""
        tried = self.clips + self.bad
        if (final or tried >= self._minimum_clips) and self.share > self._max_share:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self.causes.most_common())
            raise UserError(
                f"data.decode.max_bad_share: {self.bad} of {tried} clips are unreadable, {100 * self.share:.1f} % "
                f"({causes}{self._last}); allowed: {100 * self._max_share:g} %"
            )

    def to_json(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"clips": self.clips, "causes": dict(self.causes)}

    def resume(self, counts: Mapping[str, Any]) -> None:
        """Restore a checkpoint's counts, as returned by to_json."""
        self.clips, self.causes = int(counts["clips"]), Counter(counts["causes"])
