"""Clips that could not be read: who they were, how many, and when there are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frozen_fast.common.files import append_json_line
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
        replaced_by: id of the clip that took its place; None in evaluation, where nothing does.
    """

    source: str
    clip_id: str
    path: str
    cause: str
    message: str
    replaced_by: str | None = None


class BadClipLedger:
    """Counts and names the bad clips of a run.

    With several ranks, gather every rank's bad clips first (frozen_fast.common.ranks.gather_objects) and record them
    on all ranks, with a path on rank 0 only; then every rank comes to the same verdict.

    Attributes:
        clips: clips read well so far.
        causes: cause -> number of bad clips.
    """

    def __init__(self, path: Path | None, max_share: float, *, minimum_clips: int = MINIMUM_CLIPS) -> None:
        """Begin to count.

        Args:
            path: bad_clips.jsonl of the run folder; None: write nothing.
            max_share: the largest share of bad clips among all that were tried.
            minimum_clips: number of clips to read before the share is checked.
        """
        self.clips = 0
        self.causes: Counter[str] = Counter()
        self._path = path
        self._max_share = max_share
        self._minimum_clips = minimum_clips
        self._last = ""

    @property
    def bad(self) -> int:
        """Bad clips so far."""
        return self.causes.total()

    @property
    def share(self) -> float:
        """Bad clips among all that were tried; 0 at the start."""
        tried = self.clips + self.bad
        return self.bad / tried if tried else 0.0

    def record(self, step: int, clips: int, bad_clips: Sequence[BadClip]) -> None:
        """Add one step: how many clips were read well, and which were not."""
        self.clips += clips
        for bad in bad_clips:
            self.causes[bad.cause] += 1
            self._last = f"; the last: {bad.path}: {bad.message}"
            if self._path is not None:
                append_json_line(self._path, {"step": step, **asdict(bad)})

    def check(self, *, final: bool = False) -> None:
        """Raise a UserError past the allowed share, once enough clips were tried or the run is over."""
        tried = self.clips + self.bad
        if (final or tried >= self._minimum_clips) and self.share > self._max_share:
            causes = ", ".join(f"{cause}: {count}" for cause, count in self.causes.most_common())
            raise UserError(
                f"data.decode.max_bad_share: {self.bad} of {tried} clips could not be read, {100 * self.share:.1f} % "
                f"({causes}{self._last}); allowed: {100 * self._max_share:g} %"
            )

    def to_json(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"clips": self.clips, "causes": dict(self.causes)}

    def resume(self, counts: Mapping[str, Any]) -> None:
        """Take up a checkpoint's counts, as to_json gave them."""
        self.clips, self.causes = int(counts["clips"]), Counter(counts["causes"])
