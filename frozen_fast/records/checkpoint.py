"""Checkpoints: whole or not there at all, and complete enough to go on as if nothing had happened.

A checkpoint is a folder step_00000123 with model.safetensors, config.json and tokenizer files (what
DualEncoder.from_pretrained reads), training_state.pt (the optimizer's state by parameter name) and state.json (where
the run stood). It is written under another name, flushed to disk and renamed, and older ones go only after that. A
symbolic link `best` names the checkpoint that evaluation.keep_best has chosen; that one stays.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from frozen_fast.common.files import fsync_folder, write_json
from frozen_fast.errors import UserError

log = logging.getLogger(__name__)

OptimizerState = dict[str, dict[str, Tensor]]

_FILES = ("model.safetensors", "training_state.pt", "state.json")
_FORMAT = 1
BEST = "best"

# Keys that may differ between a run and its continuation: where and how fast it runs, not what it computes.
_MAY_CHANGE = (
    "name",
    "run_folder",
    "paper_row",
    "paper.",
    "data.decode.",
    "model.video.attention",
    "model.video.checkpointed_blocks",
    "optimizer.fused",
    "loss.local",
    "loss.chunk_rows",
    "training.",
    "checkpoints.",
    "evaluation.",
    "tracking.",
)
_MUST_NOT_CHANGE = ("training.precision",)
_SOURCE_PATH = re.compile(r"data\.sources\[\d+\]\.path")  # moved data: RunState.sources tells whether it is the same


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stood; the JSON part of a checkpoint.

    Attributes:
        step: optimizer steps done.
        stage: index of the stage that step lies in.
        steps_in_stage: optimizer steps done in that stage.
        stage_complete: the stage has no step left (its evaluation may still be to come).
        position: how far each source has been read (frozen_fast.data.plan.samplers.DataPosition as a dict).
        meter: totals of the stage so far (StageMeter.state()).
        bad_clips: clips read and not read in training so far (BadClipLedger.to_json()).
        learned_frames: rows of the temporal embedding that hold learned values.
        world_size: number of processes that wrote it; another number may go on.
        config: the run's config in plain values.
        sources: name -> fingerprint of a training source's clips, so that a changed collection is noticed.
        evaluated: the evaluation that was due after this step is done and in metrics.json.
        best: {"step", "metric", "value"} of the best evaluation so far under evaluation.keep_best; None: none.
    """

    step: int
    stage: int
    steps_in_stage: int
    stage_complete: bool
    position: dict[str, Any]
    meter: dict[str, Any]
    bad_clips: dict[str, Any]
    learned_frames: int
    world_size: int
    config: dict[str, Any] = field(repr=False)
    sources: dict[str, str]
    evaluated: bool = False
    best: dict[str, Any] | None = None


def checkpoint_name(step: int) -> str:
    """The folder's name: step_ and eight digits, so that names sort by step."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, state: RunState, write_model: Callable[[Path], None], optimizer: OptimizerState, *, keep: int
) -> Path:
    """Write a checkpoint, then delete the oldest beyond `keep`.

    Args:
        folder: the run's checkpoints folder.
        state: where the run stands.
        write_model: writes model.safetensors, config.json and the tokenizer into a folder.
        optimizer: tensors by parameter name and key.
        keep: how many of the newest stay.

    Returns:
        The new checkpoint.

    Raises:
        UserError: it cannot be written (a full disk, say); earlier checkpoints are as they were.
    """
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_model(temporary)
        torch.save({"format": _FORMAT, "optimizer": _on_cpu(optimizer)}, temporary / "training_state.pt")
        write_state(temporary, state)
        _flush(temporary)
        _move_into_place(temporary, final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"run_folder: could not write checkpoint {final} ({' '.join(str(error).split())})") from error
    best = best_checkpoint(folder)
    for old in checkpoints(folder)[keep:]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)
    return final


def write_state(checkpoint: Path, state: RunState) -> None:
    """Write a checkpoint's state.json, whole or not at all; an evaluation after the step changes it."""
    write_json(checkpoint / "state.json", {"format": _FORMAT, **asdict(state)})


def link_best(folder: Path, step: int) -> None:
    """Let `best` name the checkpoint of a step, from one moment to the next.

    Raises:
        UserError: the file system has no symbolic links.
    """
    temporary = folder / f".{BEST}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint_name(step), target_is_directory=True)
        temporary.replace(folder / BEST)
        fsync_folder(folder)
    except OSError as error:
        raise UserError(
            f"evaluation.keep_best: {folder / BEST} cannot be written ({error}); allowed: none, or a run_folder on a "
            "file system with symbolic links"
        ) from error


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `best` names; None where there is none."""
    link = folder / BEST
    return folder / os.readlink(link) if link.is_symlink() and link.exists() else None


def restore_best(folder: Path, best: Mapping[str, Any] | None) -> None:
    """Let `best` name what a checkpoint knew of it: a kill may have come before the link, or steps are cut off."""
    if best is not None and (folder / checkpoint_name(best["step"])).is_dir():
        link_best(folder, best["step"])
        return
    if best is not None:
        log.warning("the best checkpoint, step %d, is gone; the next better one takes its place", best["step"])
    (folder / BEST).unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step_*") if all((path / name).is_file() for name in _FILES)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill during writing left behind; call it while no other process writes here."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{BEST}.*.tmp"):
        path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose state can be read, None without one; unreadable ones are told and passed over."""
    for path in checkpoints(folder):
        try:
            read_state(path)
        except UserError as error:
            log.warning("passing over %s", error)
        else:
            return path
    return None


def read_state(checkpoint: Path) -> RunState:
    """Read state.json.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    try:
        values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        found = values.pop("format")
        if found != _FORMAT:
            raise UserError(f"checkpoint {checkpoint}: got format {found}; allowed: {_FORMAT}")
        return RunState(**values)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {checkpoint}: state.json cannot be read ({error})") from None


def read_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], OptimizerState]:
    """Read (weights by name, optimizer state by parameter name and key) onto the CPU, running no code from the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        weights = load_file(checkpoint / "model.safetensors")
        saved = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu")
        return weights, saved["optimizer"]
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise UserError(f"checkpoint {checkpoint}: cannot be read ({' '.join(str(error).split())})") from None


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare a checkpoint's config with the one it is resumed with.

    Args:
        saved: the checkpoint's config in plain values.
        current: the present config in plain values.

    Returns:
        What differs and may: "key: old -> new".

    Raises:
        UserError: naming the keys that would make another run of it.
    """
    old, new = dict(_flat(saved)), dict(_flat(current))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    harmful = [key for key in changed if not _may_change(key)]
    if harmful:
        shown = "; ".join(f"{key} was {old.get(key)!r}, got {new.get(key)!r}" for key in harmful[:4])
        more = f" and {len(harmful) - 4} more" if len(harmful) > 4 else ""
        raise UserError(
            f"--resume: the config differs from the run's: {shown}{more}; "
            "allowed: the same values, or another run_folder"
        )
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]


def _may_change(key: str) -> bool:
    """Whether a run may go on with another value of this key."""
    if key in _MUST_NOT_CHANGE:
        return False
    return key.startswith(_MAY_CHANGE) or _SOURCE_PATH.fullmatch(key) is not None


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings and lists by their path."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, (list, tuple)) and value:
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{path}[{index}]")]
    return [(path, list(value) if isinstance(value, tuple) else value)]


def _on_cpu(state: OptimizerState) -> OptimizerState:
    return {name: {key: tensor.detach().cpu() for key, tensor in tensors.items()} for name, tensors in state.items()}


def _flush(folder: Path) -> None:
    """Bring every file of a folder to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename a finished folder; a damaged one of the same step makes room first."""
    if final.exists():
        aside = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)
    fsync_folder(final.parent)
