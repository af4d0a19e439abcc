"""The choice of the checkpoint from which a run continues, and checks before a new run starts."""

from __future__ import annotations

from pathlib import Path

from frozen_fast.errors import UserError
from frozen_fast.models.pretrained import checkpoints_below
from frozen_fast.records.checkpoint import verify
from frozen_fast.records.checkpoint_folder import Survey, set_aside_before, survey
from frozen_fast.records.run_folder import RunFolder


def find_checkpoint(folder: RunFolder, resume: str) -> Survey:
    """Return the checkpoint to resume from.

    Args:
        folder: the run's folder.
        resume: "none", "auto" or a checkpoint's path.

    Returns:
        The checkpoint (None: start a new run), and newer ones that are damaged.

    Raises:
        UserError: a run would be overwritten, the checkpoint does not exist, or no checkpoint can be used.
    """
    if resume == "none":
        folder.refuse_to_overwrite()
        return Survey(None, {})
    if resume == "auto":
        found = survey(folder.checkpoints)
        if found.usable is None:
            _refuse_to_start_over(folder, found)
        return found
    path = Path(resume).resolve() if Path(resume).is_symlink() else Path(resume)  # checkpoints/best
    if not (path / "state.json").is_file():
        got = f"got {resume!r}{checkpoints_below(path)}"
        raise UserError(f"--resume: {got}; allowed: none, auto, or a checkpoint folder of a run (step_...)")
    verify(path)
    if path.resolve().parent != folder.checkpoints.resolve():
        folder.refuse_to_overwrite()
        return Survey(path, {})
    found = survey(folder.checkpoints)
    if found.usable is not None and found.usable.name != path.name:
        raise UserError(
            f"--resume: got {resume!r}, but this run has got to {found.usable.name}; allowed: auto, or another "
            "run_folder"
        )
    return found


def _refuse_to_start_over(folder: RunFolder, found: Survey) -> None:
    """Refuse to start a new run in a folder whose run has or had checkpoints, which would delete its results.

    Raises:
        UserError: names what exists, and how to continue or to start again.
    """
    why = "; ".join(found.damaged.values())
    if not why and set_aside_before(folder.checkpoints):
        why = "its checkpoints are damaged: " + ", ".join(path.name for path in set_aside_before(folder.checkpoints))
    saved = folder.last_status().get("checkpoint")
    if not why and (saved is not None or _has_stage_rows(folder)):
        why = f"its checkpoints are missing{f' (the last one was of step {saved})' if saved else ''}"
    if why:
        raise UserError(
            f"--resume auto: {folder.path} holds a run that cannot be continued: {why}; allowed: another run_folder to "
            "start a new run, restore the files from a copy to continue, or delete this folder to start again"
        )


def _has_stage_rows(folder: RunFolder) -> bool:
    try:
        return bool(folder.stage_rows())
    except ValueError:  # damaged, so a stage has ended and there was a checkpoint
        return True
