"""Tiny experiments on real, encoded clips: a data set, a config, and ways to look at what a run left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.training import run as run_module
from support.datasets import manifest_folder
from support.towers import make_text_tower

FRAMES, SIDE = 12, 40
REPOSITORY = Path(__file__).resolve().parents[2]


def write_clip(path: Path, number: int) -> None:
    """A Motion JPEG clip of coarse noise, its own for every number."""
    rng = np.random.default_rng(number)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        for _ in range(FRAMES):
            picture = np.kron(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_picture(path: Path, number: int) -> None:
    """A PNG of coarse noise."""
    rng = np.random.default_rng(10_000 + number)
    Image.fromarray(np.kron(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))).save(path)


def make_data(folder: Path, *, videos: int = 24, pictures: int = 12) -> dict[str, Path]:
    """Manifests of clips and pictures, and a text tower without dropout."""
    tower = make_text_tower(folder / "tower")
    config = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    config.update(dropout=0.0, attention_dropout=0.0)
    (tower / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stills = folder / "pictures"
    return {
        "videos": manifest_folder(folder / "videos", videos, suffix=".avi", write_clip=write_clip),
        "pictures": manifest_folder(stills, pictures, kind="image", suffix=".png", write_clip=write_picture),
        "tower": tower,
    }


def tiny_mapping(files: dict[str, Path], run_folder: Path, /, **sections: Any) -> dict[str, Any]:
    """A config of two stages, 1 and 4 frames; sections are merged into it, one level deep."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_folder": str(run_folder),
        "seed": 1,
        "model": {
            "video": {"size": "pico_patch16_32", "attention": "sdpa"},
            "text": {"name": str(files["tower"]), "max_tokens": 12},
            "embedding_width": 16,
        },
        "data": {
            "sources": [{"name": "videos", "path": str(files["videos"])}],
            "decode": {"backend": "pyav", "threads": 1},
        },
        "curriculum": {
            "stages": [
                {"frames": 1, "global_batch_size": 4, "steps": 4},
                {"frames": 4, "global_batch_size": 4, "steps": 4},
            ]
        },
        "optimizer": {"learning_rate": 1e-3, "gradient_clip_norm": 1.0},
        "training": {"precision": "fp32", "device": "cpu"},
        "checkpoints": {"every_steps": 0},
        "evaluation": {"every": "never"},
    }
    for name, section in deepcopy(sections).items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) and name in tree else section
    return tree


def tiny_config(files: dict[str, Path], run_folder: Path, /, **sections: Any) -> ExperimentConfig:
    """tiny_mapping, checked."""
    return config_from_mapping(tiny_mapping(files, run_folder, **sections))


@contextmanager
def without_reports() -> Iterator[pytest.MonkeyPatch]:
    """Runs in this process write no report inside: reports have tests of their own and take a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_report", lambda folder: (folder / "report.md", folder / "report.html"))
        yield patch


def losses(run_folder: Path) -> list[float]:
    """The losses of steps.jsonl, in order; every step must stand there once."""
    rows = read_json_lines(run_folder / "steps.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def environment(**changes: str) -> dict[str, str]:
    """Variables for a child process that imports from this checkout."""
    paths = os.pathsep.join(str(REPOSITORY / name) for name in (".", "kernels", "tests"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at just now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    """A torchrun command line of this interpreter."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *arguments]


def launch(accelerate: str, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run accelerate launch with a shipped file, from the repository's root."""
    own = {
        name: value
        for name, value in environment(**variables).items()
        if name in variables or not name.startswith(("ACCELERATE_", "FSDP_", "DS_", "RANK", "LOCAL_RANK", "WORLD_SIZE"))
    }
    file = REPOSITORY / "configs" / "accelerate" / f"{accelerate}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), str(script), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=300, check=False)
