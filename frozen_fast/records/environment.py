"""The environment of a run (environment.json): versions, devices, commit and command."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from frozen_fast.common.machine import cpu_model

_PACKAGES = (
    "frozen_fast",
    "torch",
    "torchvision",
    "accelerate",
    "transformers",
    "safetensors",
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "torchcodec",
    "decord",
    "av",
    "xformers",
    "triton",
    "timm",
    "deepspeed",
    "wandb",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result or a speed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> tuple[str | None, bool | None]:
    """Return (commit, whether tracked files differ from it) of this checkout; (None, None) without one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if changes is None else bool(changes)


def device_description(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's model and how many cores this process may use."""
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def describe(
    *, devices: list[str], world_size: int, distributed_type: str, precision: str, precision_reason: str
) -> dict[str, Any]:
    """Return the content of environment.json that is known at the start; the selected backends are added later."""
    commit, dirty = git_state()
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "devices": devices,
        "world_size": world_size,
        "distributed_type": distributed_type,
        "git_commit": commit,
        "git_dirty": dirty,
        "command": sys.argv,
        "decode_backends": {},
        "attention_backends": [],
        "fused_ops": None,
        "precision": precision,
        "precision_reason": precision_reason,
        "started": time.time(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
