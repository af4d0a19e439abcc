"""What a run leaves behind: one folder, whose files are listed in docs/architecture.md.

Only rank 0 writes. A resumed run goes on in the same files: rows written after its checkpoint are cut off first, so
that no step stands twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.common.files import append_json_line, read_json_lines, write_atomically, write_json
from frozen_fast.errors import UserError

Row = dict[str, Any]


class RunFolder:
    """Paths and writers of a run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.steps = self.path / "steps.jsonl"
        self.stages = self.path / "stages.json"
        self.bad_clips = self.path / "bad_clips.jsonl"
        self.metrics = self.path / "metrics.json"
        self.status = self.path / "status.json"
        self.checkpoints = self.path / "checkpoints"
        self.traces = self.path / "traces"

    def holds_a_run(self) -> bool:
        """Whether a run has got as far as its first step here."""
        return (self.steps.exists() and self.steps.stat().st_size > 0) or any(self.checkpoints.glob("step_*"))

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made or written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"run_folder: got {str(self.path)!r}; allowed: a folder that can be written to ({error})"
            ) from None

    def refuse_to_overwrite(self) -> None:
        """Raise if a new run would write into an earlier one.

        Raises:
            UserError: the folder holds a run.
        """
        if self.holds_a_run():
            raise UserError(
                f"run_folder: got {str(self.path)!r}, which already holds a run; "
                "allowed: --resume auto to go on with it, or another run_folder"
            )

    def write_status(
        self, state: str, *, step: int, stage: int, exit_code: int | None = None, message: str = ""
    ) -> None:
        """Say how the run stands: state is running, done, stopped or failed."""
        where = {"step": step, "stage": stage, "time": time.time()}
        write_json(self.status, {"state": state, "exit_code": exit_code, "message": message, **where})

    def update_environment(self, **changes: Any) -> None:
        """Replace some keys of environment.json."""
        known = json.loads(self.environment.read_text(encoding="utf-8"))
        write_json(self.environment, {**known, **changes})

    def append_steps(self, rows: Sequence[Row]) -> None:
        """Append rows to steps.jsonl in one write."""
        if rows:
            with self.steps.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def append_bad_clips(self, rows: Sequence[Row]) -> None:
        """Append rows to bad_clips.jsonl."""
        for row in rows:
            append_json_line(self.bad_clips, row)

    def evaluations(self) -> list[Row]:
        """The evaluations in metrics.json so far."""
        if not self.metrics.exists():
            return []
        return list(json.loads(self.metrics.read_text(encoding="utf-8"))["evaluations"])

    def add_evaluations(self, rows: Sequence[Row]) -> None:
        """Add evaluations to metrics.json."""
        write_json(self.metrics, {"evaluations": [*self.evaluations(), *rows]})

    def stage_rows(self) -> list[Row]:
        """The stages in stages.json so far."""
        return list(json.loads(self.stages.read_text(encoding="utf-8"))) if self.stages.exists() else []

    def put_stage_row(self, row: Row) -> None:
        """Add a stage's row to stages.json, in place of an earlier one of the same stage."""
        rows = [other for other in self.stage_rows() if other["stage"] != row["stage"]]
        write_json(self.stages, sorted([*rows, row], key=lambda other: other["stage"]))

    def cut_back(self, step: int, stage: int, *, stage_complete: bool, evaluated: bool = False) -> None:
        """Drop what was written after a checkpoint at the end of `step` in `stage`.

        Args:
            step: the checkpoint's optimizer step; 0: back to an empty run.
            stage: the stage it lies in.
            stage_complete: the checkpoint closes its stage, so that the stage's evaluation and row may stand.
            evaluated: an evaluation inside the stage, after this step, was done before the checkpoint's last word.
        """
        last = stage if stage_complete else stage - 1
        finished = [row for row in self.stage_rows() if row["stage"] <= last]
        kept_here = any(row["stage"] == stage for row in finished) if stage_complete else evaluated
        _rewrite(self.steps, lambda row: row["step"] <= step)
        # Clips that nothing replaced are those of an evaluation.
        _rewrite(
            self.bad_clips,
            lambda row: row["step"] < step or (row["step"] == step and (kept_here or row["replaced_by"] is not None)),
        )
        if self.stages.exists():
            write_json(self.stages, finished)
        if self.metrics.exists():
            kept = [row for row in self.evaluations() if row["step"] < step + kept_here]
            write_json(self.metrics, {"evaluations": kept})


def _rewrite(path: Path, keep: Callable[[Row], bool]) -> None:
    """Keep the rows of a JSON-lines file for which keep() holds."""
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in read_json_lines(path) if keep(row)))
