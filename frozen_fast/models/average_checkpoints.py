"""The mean of several checkpoints' weights (Izmailov et al., 2018; Wortsman et al., 2022)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from frozen_fast.errors import UserError, reason
from frozen_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, refuse_damage

COPIED = (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json")
"""Files that the averaged model copies from the newest checkpoint."""


def newest_checkpoints(run_folder: Path, last: int) -> list[Path]:
    """Return the newest checkpoints of a run, oldest first.

    Raises:
        UserError: the run has fewer checkpoints.
    """
    found = sorted(path for path in (run_folder / "checkpoints").glob("step_*") if (path / WEIGHTS_FILE).is_file())
    if len(found) < last:
        got = f"got {last} where {run_folder} keeps {len(found)} checkpoint(s)"
        raise UserError(f"--last: {got}; allowed: up to {len(found)} (checkpoints.keep says how many a run keeps)")
    return found[-last:]


def average_checkpoints(checkpoints: Sequence[Path], output: Path) -> None:
    """Write the mean of the weights, summed in fp64, with the last checkpoint's config.json and tokenizer.

    Integers (counters) come from the last checkpoint; running averages of BatchNorm are averaged like weights.

    Args:
        checkpoints: two or more folders with the same architecture and the same number of learned frames.
        output: a new or empty folder.

    Raises:
        UserError: fewer than two checkpoints, a damaged folder, different architectures, or an output that is not
            empty.
    """
    if len(checkpoints) < 2:
        raise UserError(f"checkpoint: got {len(checkpoints)}; allowed: two or more to average")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: got {str(output)!r}, which is not empty; allowed: a new or empty folder")
    for folder in checkpoints:
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(f"checkpoint: got {str(folder)!r}, without {WEIGHTS_FILE}; allowed: a checkpoint folder")
        refuse_damage(folder)
        if _architecture(folder) != _architecture(checkpoints[-1]):
            got = f"got {folder} and {checkpoints[-1]} of different architectures or learned frames"
            raise UserError(f"checkpoint: {got}; allowed: checkpoints of one model")
    total: dict[str, Tensor] = {}
    for folder in checkpoints:
        try:
            state = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: got {folder}, whose weights cannot be read ({reason(error)})") from error
        if total and {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in total.items()}:
            raise UserError(f"checkpoint: got {folder}, with other weights than {checkpoints[0]}; allowed: one model's")
        for name, tensor in state.items():
            if not tensor.is_floating_point() or name not in total:
                total[name] = tensor.to(torch.float64) if tensor.is_floating_point() else tensor
            else:
                total[name] += tensor
    means = {
        name: (value / len(checkpoints)).to(state[name].dtype) if value.is_floating_point() else value
        for name, value in total.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in means.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(output / WEIGHTS_FILE)
    for name in COPIED:
        if (checkpoints[-1] / name).is_file():
            shutil.copyfile(checkpoints[-1] / name, output / name)


def _architecture(folder: Path) -> object:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: got {folder}, whose {CONFIG_FILE} cannot be read ({reason(error)})") from error
