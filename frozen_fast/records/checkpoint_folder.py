"""The checkpoints folder of a run: retention, the best checkpoint, and the one to resume from.

Older checkpoints are deleted only after a new one is complete. The symbolic link `best` names the best checkpoint by
evaluation.keep_best, which is kept. A damaged checkpoint is renamed to damaged_step_00000123 and never deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozen_fast.common.files import fsync_folder, is_full
from frozen_fast.errors import UserError
from frozen_fast.records.checkpoint import FILES, checkpoint_name, read_state, verify

log = logging.getLogger(__name__)

BEST = "best"
_DAMAGED = "damaged_"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept after a new one is complete, in addition to the best.

    Attributes:
        newest: number of newest checkpoints to keep.
        every_steps: those whose step is a multiple of this; 0: none.
        stage_ends: those that close a stage.
    """

    newest: int
    every_steps: int = 0
    stage_ends: bool = False

    def keeps(self, checkpoint: Path) -> bool:
        """Return whether to keep a checkpoint that is not one of the newest."""
        if self.every_steps and int(checkpoint.name.removeprefix("step_")) % self.every_steps == 0:
            return True
        if not self.stage_ends:
            return False
        try:
            return read_state(checkpoint).stage_complete
        except UserError:  # damaged: keep it
            return True


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have all their files, newest first; the files are not read."""
    return [path for path in _steps(folder) if all((path / name).is_file() for name in FILES)]


def prune(folder: Path, retention: Retention) -> None:
    """Delete the checkpoints that are not kept."""
    best = best_checkpoint(folder)
    for old in checkpoints(folder)[retention.newest :]:
        if old != best and not retention.keeps(old):
            # Rename first, so that a killed process never leaves an incomplete checkpoint under its name.
            aside = old.with_name(f".{old.name}.{os.getpid()}.old.tmp")
            old.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Survey:
    """Content of a checkpoints folder.

    Attributes:
        usable: the newest checkpoint whose files match their checksums; None: none.
        damaged: newer ones that cannot be used (all of them if none is usable) -> reason.
    """

    usable: Path | None
    damaged: dict[Path, str]


def survey(folder: Path) -> Survey:
    """Verify checkpoints from the newest back, up to the first good one."""
    damaged: dict[Path, str] = {}
    for path in _steps(folder):
        try:
            verify(path)
        except UserError as error:
            damaged[path] = str(error)
        else:
            return Survey(path, damaged)
    return Survey(None, damaged)


def set_aside(damaged: Mapping[Path, str]) -> list[str]:
    """Rename checkpoints that cannot be used to damaged_step_..., so that they are not loaded.

    Returns:
        One line for each with the damage and the new name; also logged.
    """
    lines = []
    for path, why in damaged.items():
        aside = path.with_name(_DAMAGED + path.name)
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{_DAMAGED}{path.name}_{number}")
        path.rename(aside)
        lines.append(f"{why}; renamed to {aside.name}; using an older checkpoint")
        log.warning(lines[-1])
    return lines


def set_aside_before(folder: Path) -> list[Path]:
    """Return the damaged checkpoints that earlier starts have renamed."""
    return sorted(folder.glob(f"{_DAMAGED}step_*"))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed process; call this while no other process writes to the folder."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [*folder.glob(f".{BEST}.*.tmp"), *folder.glob("step_*/.*.tmp")]:
        path.unlink(missing_ok=True)


def link_best(folder: Path, step: int) -> None:
    """Set the link `best` to the checkpoint of a step, atomically.

    Raises:
        UserError: the file system has no symbolic links.
        OSError: the disk is full.
    """
    temporary = folder / f".{BEST}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint_name(step), target_is_directory=True)
        temporary.replace(folder / BEST)
        fsync_folder(folder)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(
            f"evaluation.keep_best: {folder / BEST} cannot be written ({error}); allowed: none, or a run_folder on a "
            "file system with symbolic links"
        ) from error


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that `best` names; None where there is none."""
    link = folder / BEST
    return folder / os.readlink(link) if link.is_symlink() and link.exists() else None


def restore_best(folder: Path, best: Mapping[str, Any] | None) -> None:
    """Restore the link `best` from a checkpoint's state, after a process was killed or steps were dropped."""
    if best is not None and (folder / checkpoint_name(best["step"])).is_dir():
        link_best(folder, best["step"])
        return
    if best is not None:
        log.warning("the best checkpoint, step %d, is missing; the next evaluation sets a new best", best["step"])
    (folder / BEST).unlink(missing_ok=True)


def _steps(folder: Path) -> list[Path]:
    """Return every folder of a step, complete or not, newest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[len("step_") :].isdecimal()]
    return sorted(found, key=lambda path: path.name, reverse=True)
