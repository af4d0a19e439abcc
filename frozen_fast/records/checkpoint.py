"""The files of a checkpoint: written atomically, verified before reading.

A checkpoint is a folder step_00000123 with model.safetensors, config.json and tokenizer files (what
DualEncoder.from_pretrained reads), training_state.pt (the optimizer's state by parameter name), manifest.json (size
and SHA-256 of each of these files) and state.json (the run's position, the checksum of manifest.json, and its own).
It is written under another name, flushed to disk, read back and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frozen_fast.common.checksums import MANIFEST, file_digest, find_damage, is_sealed, seal, write_manifest
from frozen_fast.common.files import fsync_folder, write_atomically
from frozen_fast.errors import UserError, reason

log = logging.getLogger(__name__)

OptimizerState = dict[str, dict[str, Tensor]]

FILES = ("model.safetensors", "training_state.pt", "state.json")
_STATE = "state.json"
_FORMAT = 2
_FORMAT_WITHOUT_CHECKSUMS = 1


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; earlier ones are unchanged."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run: the JSON part of a checkpoint.

    Attributes:
        step: optimizer steps done.
        stage: index of the stage of this step.
        steps_in_stage: optimizer steps done in that stage.
        stage_complete: the stage has no step left (its evaluation may still be to come).
        position: how far each source has been read (frozen_fast.data.plan.samplers.DataPosition as a dict).
        meter: totals of the stage so far (StageMeter.state()).
        bad_clips: counts of readable and bad clips in training so far (BadClipLedger.to_json()).
        learned_frames: rows of the temporal embedding that hold learned values.
        world_size: number of processes that wrote it; a run may resume with another number.
        config: the run's config in plain values.
        sources: name -> fingerprint of a training source's clips, so that a changed collection is noticed.
        evaluated: the evaluation that was due after this step is done and in metrics.json.
        best: {"step", "metric", "value"} of the best evaluation so far under evaluation.keep_best; None: none.
        rollbacks: number of times that the run returned to a checkpoint after a non-finite loss; each time changes
            the order of the data.
        batch_parts: source -> parts that its batches are cut into in this stage, where they did not fit in memory.
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
    rollbacks: int = 0
    batch_parts: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """Return the folder's name: step_ and eight digits, so that names sort by step."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, state: RunState, write_model: Callable[[Path], None], optimizer: OptimizerState
) -> Path:
    """Write a checkpoint, read it back and move it into place.

    Args:
        folder: the run's checkpoints folder.
        state: state of the run.
        write_model: writes model.safetensors, config.json and the tokenizer into a folder.
        optimizer: tensors by parameter name and key.

    Returns:
        The new checkpoint.

    Raises:
        CheckpointWriteError: it cannot be written (such as a full disk), or its files differ when read back;
            earlier checkpoints are unchanged.
    """
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_model(temporary)
        torch.save({"format": _FORMAT, "optimizer": _on_cpu(optimizer)}, temporary / "training_state.pt")
        write_manifest(temporary, without=(_STATE,))
        write_state(temporary, state)
        _flush(temporary)
        damage = find_damage(temporary, from_disk=True)
        if damage is not None:
            raise OSError(f"read back after writing, {damage}")
        _move_into_place(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = " ".join(str(error).split())
        raise CheckpointWriteError(f"run_folder: could not write checkpoint {final} ({why})") from error
    return final


def write_state(checkpoint: Path, state: RunState) -> None:
    """Write a checkpoint's state.json atomically; an evaluation after the step updates it."""
    values = {"format": _FORMAT, **asdict(state), "manifest_sha256": file_digest(checkpoint / MANIFEST)}
    write_atomically(checkpoint / _STATE, seal(values))


def verify(checkpoint: Path) -> RunState:
    """Compare every file of a checkpoint with its checksum.

    Returns:
        The state of the run.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    state = read_state(checkpoint)
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {checkpoint}: {missing[0]} is missing")
    if not (checkpoint / MANIFEST).is_file():
        log.warning("checkpoint %s was written without checksums: its files are not verified", checkpoint)
        return state
    damage = find_damage(checkpoint)
    if damage is not None:
        raise UserError(f"checkpoint {checkpoint}: {damage}")
    return state


def read_state(checkpoint: Path) -> RunState:
    """Read state.json.

    Raises:
        UserError: it is missing, damaged or of another format, or manifest.json does not match.
    """
    try:
        data = (checkpoint / _STATE).read_bytes()
        sealed = is_sealed(data)
        values = json.loads(data)
        found = values.pop("format")
        if found == _FORMAT_WITHOUT_CHECKSUMS and not sealed and not (checkpoint / MANIFEST).exists():
            return _typed_state(values)
        if found not in (_FORMAT, _FORMAT_WITHOUT_CHECKSUMS):
            raise UserError(f"checkpoint {checkpoint}: got format {found}; allowed: {_FORMAT}")
        if not sealed:
            raise UserError(f"checkpoint {checkpoint}: {_STATE} does not match its checksum")
        values.pop("sha256")
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        if values.pop("manifest_sha256") != manifest:
            raise UserError(f"checkpoint {checkpoint}: {MANIFEST} does not match its checksum")
        return _typed_state(values)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {checkpoint}: {Path(error.filename).name} is missing") from None
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint}: {_STATE} cannot be read ({error})") from None
    except UserError:
        raise
    except ValueError as error:  # JSON, and text that is not UTF-8
        raise UserError(f"checkpoint {checkpoint}: {_STATE} cannot be read ({error})") from None


def _typed_state(values: dict[str, Any]) -> RunState:
    """Build a RunState; a value of another type than its field's is a TypeError."""
    state = RunState(**values)
    kinds: dict[str, type | tuple[type, ...]] = {"int": int, "bool": bool, "dict[str, Any]": dict}
    kinds |= {"dict[str, str]": dict, "dict[str, Any] | None": (dict, type(None))}
    for one in fields(RunState):
        value = getattr(state, one.name)
        if not isinstance(value, kinds[str(one.type)]) or (one.type == "int" and isinstance(value, bool)):
            raise TypeError(f"{one.name}: got {str(value)[:40]!r}; allowed: {one.type}")
    return state


def read_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], OptimizerState]:
    """Read (weights by name, optimizer state by parameter name and key) onto the CPU; executes no code from the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        weights = load_file(checkpoint / "model.safetensors")
        saved = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu")
        return weights, saved["optimizer"]
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise UserError(f"checkpoint {checkpoint}: cannot be read ({reason(error)})") from None


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
    """Rename a finished folder; a damaged one of the same step is moved away first."""
    if final.exists():
        aside = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)
    fsync_folder(final.parent)
