"""Logging to experiment trackers (the table extensions.trackers), on rank 0 only."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from frozen_fast.common.files import write_json
from frozen_fast.common.secrets import hide_secrets, without_secrets
from frozen_fast.config import to_plain
from frozen_fast.config.extensions import trackers
from frozen_fast.config.schema import TrackingConfig
from frozen_fast.errors import UserError, reason

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Arguments for opening a run in a tracker.

    Attributes:
        project: the project or experiment that lists it.
        name: its name there.
        folder: where local files go.
        known_id: its id in this tracker if the run exists; it is then continued.
        id: known_id, or 32 hexadecimal digits for a new run where the tracker lets the caller choose.
        step: the optimizer step that training continues after; None for a new run.
        wandb_mode: "online" or "offline".
    """

    project: str
    name: str
    folder: Path
    known_id: str | None
    id: str
    step: int | None
    wandb_mode: str


@dataclass(frozen=True)
class TrackerSetUp:
    """Return value of a function in the table extensions.trackers.

    Attributes:
        tracker: not started yet.
        run_id: returns the id for continuing the run; called after the start.
        takes_text: whether its log() accepts text as well as numbers.
        name_of: returns the tracker's name for a value such as `t2v/R@1`.
    """

    tracker: GeneralTracker
    run_id: Callable[[], str]
    takes_text: bool = True
    name_of: Callable[[str], str] = str


class Trackers:
    """The started trackers of a run; a tracker that fails later is disabled with a warning."""

    def __init__(self, started: Mapping[str, TrackerSetUp] | None = None) -> None:
        self._started = dict(started or {})

    @classmethod
    def start(
        cls, settings: TrackingConfig, *, name: str, config: Any, folder: Path, step: int | None = None
    ) -> Trackers:
        """Open a run in every tracker of the config, or continue the run recorded in the folder.

        The ids of the runs are kept in FOLDER/trackers.json.

        Args:
            settings: the config's section `tracking`.
            name: the run's name if the section has none.
            config: a section of the schema; its values are logged as the run's config.
            folder: the run's folder.
            step: the optimizer step that training continues after; None: a new run, even if the folder contains one.

        Raises:
            UserError: a tracker is not installed, or cannot start.
        """
        known = {} if step is None else _known_ids(folder)
        if settings.trackers:
            PartialState()  # Accelerate's trackers read the rank from it; a sweep has not created it
        started: dict[str, TrackerSetUp] = {}
        ids = dict(known)
        for kind in settings.trackers:
            run = TrackedRun(
                project=hide_secrets(settings.project),
                name=hide_secrets(settings.run_name or name),
                folder=folder,
                known_id=known.get(kind),
                id=known.get(kind) or secrets.token_hex(16),
                step=step,
                wandb_mode=settings.wandb_mode,
            )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                set_up = trackers.load(kind)(run)
                with _clean_command_line():
                    set_up.tracker.start()
                if kind not in known:
                    set_up.tracker.store_init_configuration(_flat(without_secrets(to_plain(config))))
                ids[kind] = str(set_up.run_id())
            except ImportError as error:
                got = f"got {kind!r}, which is not installed ({error.name or error})"
                raise UserError(f"tracking.trackers: {got}; allowed: trackers that are installed") from None
            except Exception as error:  # a tracker can raise anything: report it in one line
                got = f"got {kind!r}, which does not start ({reason(error)})"
                raise UserError(f"tracking.trackers: {got}; allowed: trackers that are set up") from error
            started[kind] = set_up
        if settings.trackers:
            try:
                write_json(folder / "trackers.json", ids)
            except OSError as error:
                log.warning("trackers.json could not be written (%s): a resumed run opens new runs there", error)
        return cls(started)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send values at a step (an optimizer step of a run, a trial of a sweep); None values are skipped."""
        for kind, set_up in list(self._started.items()):
            kinds = (int, float, str) if set_up.takes_text else (int, float)
            sent = {
                set_up.name_of(name): without_secrets(value)
                for name, value in values.items()
                if isinstance(value, kinds)
            }
            try:
                set_up.tracker.log(sent, step=step)
            except Exception as error:  # a failing service must not end training
                log.warning("tracker %s failed and is no longer used: %s", kind, reason(error))
                del self._started[kind]

    def close(self) -> None:
        """Finish the runs, so that nothing is lost at exit."""
        for kind, set_up in self._started.items():
            try:
                set_up.tracker.finish()
            except Exception as error:  # as in log
                log.warning("tracker %s did not finish: %s", kind, reason(error))
        self._started = {}


@contextlib.contextmanager
def _clean_command_line() -> Iterator[None]:
    """sys.argv without secrets: trackers copy it into the description of a run."""
    kept = sys.argv
    sys.argv = [hide_secrets(word) for word in kept]
    try:
        yield
    finally:
        sys.argv = kept


def _known_ids(folder: Path) -> dict[str, str]:
    """Return the run ids of a folder's trackers; earlier versions wrote the file wandb_id."""
    path, earlier = folder / "trackers.json", folder / "wandb_id"
    if path.is_file():
        try:
            return {str(kind): str(run_id) for kind, run_id in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError):
            log.warning("%s cannot be read: opening new runs in the trackers", path)
    return {"wandb": earlier.read_text(encoding="utf-8").strip()} if earlier.is_file() else {}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested plain values to `a.b.0` -> scalar, which every tracker can display."""
    if not isinstance(value, (dict, list)):
        return {path: "null" if value is None else value}
    flat: dict[str, Any] = {}
    for step, below in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flat(below, f"{path}.{step}" if path else str(step))
    return flat
