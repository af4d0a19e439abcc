"""Finds free GPUs for trials without importing torch, which would allocate memory on them."""

from __future__ import annotations

import os
import shutil
import subprocess

from frozen_fast.errors import UserError

FREE_MEMORY_SHARE = 0.9


def free_gpus() -> list[str]:
    """Find the GPUs that trials may use.

    Returns:
        Indices of visible GPUs of which at least 90 % of the memory is free; empty on a machine without any, and where
        CUDA_VISIBLE_DEVICES hides all.

    Raises:
        UserError: there are visible GPUs, but none is free, or CUDA_VISIBLE_DEVICES names none of this machine.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else {part.strip() for part in visible.split(",") if part.strip()}
    gpus = [[part.strip() for part in line.split(",")] for line in answer.stdout.strip().splitlines()]
    if not gpus or allowed in (set(), {"-1"}):
        return []
    seen = [gpu for gpu in gpus if allowed is None or _is_named(gpu[0], gpu[1], allowed)]
    if not seen:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: got {visible!r}, which names no GPU of this machine; allowed: indices 0 to "
            f"{len(gpus) - 1}, or UUIDs as nvidia-smi -L prints them"
        )
    free = [gpu[0] for gpu in seen if float(gpu[3]) >= FREE_MEMORY_SHARE * float(gpu[2])]
    if not free:
        raise UserError(
            f"GPUs: got {len(seen)} that are all in use (less than {FREE_MEMORY_SHARE:.0%} of their memory is free); "
            "allowed: at least one free GPU (nvidia-smi shows what uses them), or CUDA_VISIBLE_DEVICES= for the CPU"
        )
    return free


def _is_named(index: str, uuid: str, allowed: set[str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES names a GPU: by its index, or by the beginning of its UUID."""
    return index in allowed or any(name.startswith("GPU-") and uuid.startswith(name) for name in allowed)


def device_groups(parallel: int, devices_per_trial: int) -> list[dict[str, str]]:
    """Environment variables of each place in which a trial can run at the same time as the others.

    Args:
        parallel: number of places asked for; 0: as many as free GPUs allow, one without GPUs.
        devices_per_trial: GPUs of one trial.

    Raises:
        UserError: GPUs exist, but too few are free for one trial.
    """
    gpus = free_gpus()
    if not gpus:
        return [{} for _ in range(max(1, parallel))]
    groups = [gpus[i : i + devices_per_trial] for i in range(0, len(gpus) - devices_per_trial + 1, devices_per_trial)]
    if not groups:
        raise UserError(
            f"devices_per_trial: got {devices_per_trial}; allowed: at most {len(gpus)}, the GPUs that are free"
        )
    chosen = groups[:parallel] if parallel else groups
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in chosen]
