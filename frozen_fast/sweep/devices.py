"""Which GPUs are free for trials, asked without importing torch (an importer would hold memory on them)."""

from __future__ import annotations

import os
import shutil
import subprocess

from frozen_fast.errors import UserError

FREE_MEMORY_SHARE = 0.9


def free_gpus() -> list[str]:
    """Indices of visible GPUs of which at least 90 % of the memory is free; empty on a machine without any."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else {part.strip() for part in visible.split(",") if part.strip()}
    free = []
    for line in answer.stdout.strip().splitlines():
        index, total, unused = (part.strip() for part in line.split(","))
        if (allowed is None or index in allowed) and float(unused) >= FREE_MEMORY_SHARE * float(total):
            free.append(index)
    return free


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
