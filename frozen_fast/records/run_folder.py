"""The run folder; docs/architecture.md lists its files.

Only rank 0 writes. A resumed run continues in the same files: rows written after its checkpoint are removed first, so
that each step has one row. Rows that cannot be written to a full or failing disk are kept in memory and written later.
Nothing is written through a symbolic link out of the folder, and no secrets of the environment are written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from frozen_fast.common.files import append_text, links_outside, overwrite, read_rows, write_atomically, write_json
from frozen_fast.common.secrets import hide_secrets
from frozen_fast.errors import UserError

Row = dict[str, Any]

log = logging.getLogger(__name__)


class RunFolder:
    """Paths and writers of a run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.steps = self.path / "steps.jsonl"
        self.stages = self.path / "stages.json"
        self.bad_clips = self.path / "bad_clips.jsonl"
        self.non_finite = self.path / "non_finite.jsonl"
        self.metrics = self.path / "metrics.json"
        self.events = self.path / "events.jsonl"
        self.status = self.path / "status.json"
        self.lock = self.path / "run.lock"
        self.checkpoints = self.path / "checkpoints"
        self.traces = self.path / "traces"
        self.hangs = self.path / "hangs"
        self._unwritten_rows: dict[Path, str] = {}
        self._unwritten_values: dict[Path, Any] = {}
        self._told: set[Path] = set()
        self._status: Row = {}
        self._status_guard = threading.Lock()

    def holds_a_run(self) -> bool:
        """Whether the folder contains a run with at least one step."""
        return (self.steps.exists() and self.steps.stat().st_size > 0) or any(self.checkpoints.glob("*step_*"))

    def create(self) -> None:
        """Create the folder.

        Raises:
            UserError: it cannot be created or written to, or contains a symbolic link out of it.
        """
        for link in links_outside(self.path):
            raise UserError(
                f"run_folder: got {str(self.path)!r}, in which {link.relative_to(self.path)} is a symbolic link to "
                f"{os.readlink(link)}, outside of it; allowed: links that stay inside (run_folder itself may be a link)"
            )
        with self.must_be_writable():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / ".writable", "")
            (self.path / ".writable").unlink()

    @contextlib.contextmanager
    def must_be_writable(self) -> Iterator[None]:
        """Raise a UserError that names the folder for an OSError within."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run_folder: got {str(self.path)!r}; allowed: a folder that can be written to ({error})"
            ) from None

    def refuse_to_overwrite(self) -> None:
        """Raise if the folder already contains a run.

        Raises:
            UserError: the folder contains a run.
        """
        if self.holds_a_run():
            raise UserError(
                f"run_folder: got {str(self.path)!r}, which already contains a run; "
                "allowed: --resume auto to continue it, or another run_folder"
            )

    # Status

    def write_status(
        self,
        state: str,
        *,
        step: int,
        stage: int,
        exit_code: int | None = None,
        message: str = "",
        checkpoint: int | None = None,
    ) -> None:
        """Write status.json.

        Args:
            state: running, done, stopped or failed.
            step: optimizer steps done.
            stage: index of the stage.
            exit_code: of the process; None while it runs.
            message: why it stopped or failed.
            checkpoint: step of the newest checkpoint; None: unchanged.

        Raises:
            OSError: the old file cannot be overwritten either.
        """
        now = time.time()
        with self._status_guard:
            known = self._status.get("checkpoint") if checkpoint is None else checkpoint
            where = {"step": step, "stage": stage, "checkpoint": known, "time": now, "heartbeat": now}
            process = {"host": socket.gethostname(), "pid": os.getpid()}
            self._status = {"state": state, "exit_code": exit_code, "message": message, **where, **process}
            self._put_status()

    def note_checkpoint(self, step: int) -> None:
        """Record the newest checkpoint in status.json."""
        with self._status_guard:
            if self._status:
                self._status["checkpoint"] = step
                self._put_status()

    def beat(self) -> None:
        """Update the heartbeat of status.json, which distinguishes a running process from a dead one."""
        with self._status_guard:
            if self._status:
                self._status["heartbeat"] = time.time()
                self._put_status()

    def last_status(self) -> Row:
        """The status.json of an earlier process; empty if it cannot be read."""
        try:
            status = json.loads(self.status.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    def _put_status(self) -> None:
        text = hide_secrets(json.dumps(self._status, indent=2) + "\n")
        try:
            write_atomically(self.status, text)
        except OSError:
            overwrite(self.status, text)

    # Appended and replaced files

    def write_config(self, text: str) -> None:
        """Write config.yaml.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(self.config, hide_secrets(text))

    def update_environment(self, **changes: Any) -> None:
        """Replace some keys of environment.json."""
        known = self._value(self.environment, dict)
        self._put(self.environment, {**known, **changes})

    def append_steps(self, rows: Sequence[Row]) -> None:
        """Append rows to steps.jsonl in one write."""
        self._append(self.steps, rows)

    def append_bad_clips(self, rows: Sequence[Row]) -> None:
        """Append rows to bad_clips.jsonl."""
        self._append(self.bad_clips, rows)

    def append_non_finite(self, rows: Sequence[Row]) -> None:
        """Append rows to non_finite.jsonl: steps whose loss or gradient was NaN or infinite, and their clips."""
        self._append(self.non_finite, rows)

    def append_event(self, kind: str, message: str, **details: Any) -> None:
        """Append a row to events.jsonl: warnings and repairs."""
        self._append(self.events, [{"time": time.time(), "kind": kind, "message": message, **details}])

    def evaluations(self) -> list[Row]:
        """The evaluations in metrics.json so far."""
        return list(self._value(self.metrics, dict).get("evaluations", []))

    def add_evaluations(self, rows: Sequence[Row]) -> None:
        """Add evaluations to metrics.json."""
        self._put(self.metrics, {"evaluations": [*self.evaluations(), *rows]})

    def stage_rows(self) -> list[Row]:
        """The stages in stages.json so far."""
        return list(self._value(self.stages, list))

    def put_stage_row(self, row: Row) -> None:
        """Add a stage's row to stages.json; it replaces an earlier row of the same stage."""
        rows = [other for other in self.stage_rows() if other["stage"] != row["stage"]]
        self._put(self.stages, sorted([*rows, row], key=lambda other: other["stage"]))

    def write_pending(self) -> list[Path]:
        """Retry failed writes; return the files that still cannot be written."""
        for path in list(self._unwritten_rows):
            self._append(path, [])
        for path, value in list(self._unwritten_values.items()):
            self._put(path, value)
        return [*self._unwritten_rows, *self._unwritten_values]

    def _append(self, path: Path, rows: Sequence[Row]) -> None:
        new = hide_secrets("".join(json.dumps(row) + "\n" for row in rows))
        text = self._unwritten_rows.pop(path, "") + new
        if not text:
            return
        try:
            append_text(path, text)
        except OSError as error:
            self._unwritten_rows[path] = text
            self._tell(path, error)

    def _put(self, path: Path, value: Any) -> None:
        try:
            write_atomically(path, hide_secrets(json.dumps(value, indent=2) + "\n"))
            self._unwritten_values.pop(path, None)
        except OSError as error:
            self._unwritten_values[path] = value
            self._tell(path, error)

    def _value(self, path: Path, kind: type) -> Any:
        """A JSON file's last content, including pending writes; empty if the file is missing."""
        if path in self._unwritten_values:
            return self._unwritten_values[path]
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else kind()

    def _tell(self, path: Path, error: OSError) -> None:
        if path not in self._told:
            self._told.add(path)
            log.warning("%s could not be written (%s): kept in memory, the run continues", path, error)

    # Resuming

    def repair(self) -> list[str]:
        """Repair the files of an earlier process; copies damaged files first.

        Returns:
            One line for each file with damage: what was removed, and the copy's name; also logged.
        """
        lines = []
        for path, kind in ((self.environment, dict), (self.stages, list), (self.metrics, dict)):
            if path.exists() and not _is_sound(path, kind):
                aside = _aside(path)
                path.rename(aside)
                lines.append(f"{path.name} cannot be read: renamed to {aside.name}, starting a new one")
        for path in (self.steps, self.bad_clips, self.non_finite, self.events):
            key = "kind" if path == self.events else "step"
            rows, problems = read_rows(path)
            sound = [row for row in rows if isinstance(row.get(key), int if key == "step" else str)]
            left_out = len(problems) + len(rows) - len(sound)
            if left_out:
                aside = _aside(path)
                os.link(path, aside)
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in sound))
                lines.append(f"{path.name}: {left_out} unreadable line(s) removed; the original is {aside.name}")
        for line in lines:
            log.warning(line)
        return lines

    def cut_back(self, step: int, stage: int, *, stage_complete: bool, evaluated: bool = False) -> None:
        """Drop rows written after the checkpoint of `step` in `stage`.

        Args:
            step: the checkpoint's optimizer step; 0: back to an empty run.
            stage: the stage it lies in.
            stage_complete: the checkpoint ends its stage, so the stage's evaluation and row are kept.
            evaluated: the checkpoint's state includes the evaluation after this step.
        """
        last = stage if stage_complete else stage - 1
        finished = [row for row in self.stage_rows() if row["stage"] <= last]
        kept_here = any(row["stage"] == stage for row in finished) if stage_complete else evaluated
        _rewrite(self.steps, lambda row: row["step"] <= step)
        # Rows on stops and roll-backs are kept; skipped steps are repeated.
        _rewrite(self.non_finite, lambda row: row["step"] <= step or row.get("action") != "skip")
        # Bad clips without a replacement come from an evaluation.
        _rewrite(
            self.bad_clips,
            lambda row: (
                row["step"] < step or (row["step"] == step and (kept_here or row.get("replaced_by") is not None))
            ),
        )
        if self.stages.exists():
            write_json(self.stages, finished)
        if self.metrics.exists():
            kept = [row for row in self.evaluations() if row["step"] < step + kept_here]
            write_json(self.metrics, {"evaluations": kept})


def _is_sound(path: Path, kind: Any) -> bool:
    """Whether a JSON file is of its kind, and its rows have a step or a stage."""
    try:
        value: Any = json.loads(path.read_bytes())
        if not isinstance(value, kind):
            return False
        if path.name == "stages.json":
            return all(isinstance(row["stage"], int) for row in value)
        if path.name == "metrics.json":
            return all(isinstance(row["step"], int) for row in value["evaluations"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return True


def _aside(path: Path) -> Path:
    """A free name beside a file, such as steps.damaged_1.jsonl."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged_{number}{path.suffix}")).exists():
        number += 1
    return aside


def _rewrite(path: Path, keep: Callable[[Row], bool]) -> None:
    """Keep the rows of a JSON-lines file for which keep() holds."""
    if path.exists():
        rows, _ = read_rows(path)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if keep(row)))
