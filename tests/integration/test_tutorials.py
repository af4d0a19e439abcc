"""Every tutorial of the site, followed literally: its bash blocks run unchanged and in order, on tiny data.

The commands run in a copy of the checkout. Only files that they name are replaced: data sets and released weights by
tiny ones in the same layout, experiment files by ones that extend the original with a smaller model and fewer steps,
and configs/accelerate/gpu_8.yaml by two CPU processes. A command that needs more machines runs as its own dry run, and
a budget of clips on a command line is divided by SMALLER.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.data_set_folders import write_webvid_splits
from support.datasets import manifest_folder, write_msrvtt
from support.doc_commands import ROOT, blocks_of
from support.released import ReleasedModel, write_released_checkpoint
from support.runs import make_data, tiny_mapping, write_clip
from support.towers import make_text_tower

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]

PARTS = (
    "frozen_fast",
    "kernels",
    "launch",
    "configs",
    "benchmarks",
    "examples",
    "train.py",
    "setup.py",
    "pyproject.toml",
)
TINY_MODEL = {"video": {"size": "pico_patch16_32", "weights": "none"}, "text": {"name": "tower", "max_tokens": 12}}

ELSEWHERE = {
    "bash launch/demo.sh": "tests/integration/test_demo.py",
    "bash launch/test.sh": "this suite",
    "pip install": "tests/unit/test_docs_commands.py checks the extra",
    "frozen-fast serve": "tests/integration/test_serve.py",
    "frozen-fast push --checkpoint runs/mine --repo org/name --license cc-by-nc-4.0$": "needs the Hub",
}
"""Beginnings of commands that are not run here -> what runs or checks them."""

DRY_RUNS = {
    r"launch/multi_node\.sh": "launch/multi_node.sh --dry-run --processes 16",
    r"^sbatch --nodes 2 --time 08:00:00 ": "SLURM_NNODES=2 DRY_RUN=1 bash ",
    r"(sweep\.py configs/sweeps/gpu_8\.yaml)$": r"\1 --dry-run",
}
"""Commands for several machines or GPUs -> their own dry run."""
SMALLER = 900


class Checkout:
    """A copy of the project in an empty folder, whose configs are small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.folder.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "results", "*.so")
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, self.folder / part, ignore=ignored)
            else:
                shutil.copy(source, self.folder / part)
        (self.folder / ".venv").symlink_to(sys.prefix)
        no_gpu = folder / "no_gpu"
        no_gpu.mkdir()
        (no_gpu / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (no_gpu / "nvidia-smi").chmod(0o755)
        paths = [str(no_gpu), str(Path(sys.prefix) / "bin"), os.environ["PATH"]]
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join(str(self.folder / name) for name in (".", "kernels")),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        make_text_tower(self.folder / "tower")

    def shrink(self, config: str, changes: dict[str, Any]) -> None:
        """Replace a config by one that extends it with smaller sizes."""
        path = self.folder / "configs" / config
        original = path.with_name(f"_full_{path.name}")
        path.rename(original)
        path.write_text(yaml.safe_dump({"extends": original.name, **changes}), encoding="utf-8")

    def two_cpu_processes(self, name: str) -> None:
        """Replace an Accelerate file by two processes on the CPU."""
        folder = self.folder / "configs" / "accelerate"
        shutil.copy(folder / "cpu_2.yaml", folder / name)

    def run(self, command: str) -> str:
        """Run one command as the page has it; returns what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def follow(self, page: str) -> dict[str, str]:
        """Run a page's commands in order; returns what each printed."""
        printed = {}
        for block in blocks_of(ROOT / page):
            for command in block.commands:
                if any(re.match(beginning, command) for beginning in ELSEWHERE):
                    continue
                for pattern, dry_run in DRY_RUNS.items():
                    command = re.sub(pattern, dry_run, command)
                budget = re.compile(r"(?<=curriculum\.budget_clips=)\d+")
                command = budget.sub(lambda found: str(int(found[0]) // SMALLER), command)
                printed[command] = self.run(command)
        assert printed, page
        return printed


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def stages(*frames: int, batch: int = 4) -> dict[str, Any]:
    return {
        "budget_clips": None,
        "budget_epochs": None,
        "stages": [{"frames": number, "global_batch_size": batch, "steps": 2} for number in frames],
    }


SMALL_RUN: dict[str, Any] = {
    "model": TINY_MODEL,
    "optimizer": {"warmup_steps": 0},
    "training": {"precision": "fp32"},
    "data": {"decode": {"backend": "pyav", "threads": 1}},
}


OWN_CLIPS = {
    **SMALL_RUN,
    "model": {"video": TINY_MODEL["video"], "text": {**TINY_MODEL["text"], "frozen_layers": 0}},
    "curriculum": stages(1, 4),
}


def own_clips(checkout: Checkout, name: str, splits: dict[str, int]) -> None:
    """NAME.jsonl with clips of each split ("" without splits) in the checkout."""
    lines = []
    for split, count in splits.items():
        folder = checkout.folder / f"{name}_{split}_clips"
        manifest = manifest_folder(folder, count, suffix=".avi", write_clip=write_clip)
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row |= {"id": f"{split}{row['id']}", "path": f"{folder.name}/{row['path']}"}
            lines.append(json.dumps({**row, "split": split} if split else row))
    (checkout.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def get_started(checkout: Checkout) -> None:
    own_clips(checkout, "clips", {"train": 8, "test": 4})
    checkout.shrink("finetune/own_clips.yaml", OWN_CLIPS)


def finetuning(checkout: Checkout) -> None:
    own_clips(checkout, "train", {"": 8})
    own_clips(checkout, "test", {"": 4})
    original = yaml.safe_load((checkout.folder / "configs/finetune/own_clips.yaml").read_text(encoding="utf-8"))
    curriculum = original["curriculum"]
    curriculum["budget_clips"] //= SMALLER
    curriculum["stages"] = [{**stage, "global_batch_size": 4, "share": 0.5} for stage in curriculum["stages"]]
    checkout.shrink("finetune/own_clips.yaml", {**OWN_CLIPS, "curriculum": curriculum})


def pretrain(checkout: Checkout) -> None:
    write_webvid_splits(checkout.folder / "data" / "WebVid", 8, write_avi_named_mp4)
    checkout.two_cpu_processes("gpu_8.yaml")
    changes = {**SMALL_RUN, "curriculum": stages(1, 4, 8)}
    checkout.shrink("pretrain/webvid_1_4_8.yaml", changes)


def launching(checkout: Checkout) -> None:
    pretrain(checkout)
    checkout.two_cpu_processes("gpu_2x8.yaml")


def finetune_msrvtt(checkout: Checkout) -> None:
    write_msrvtt(checkout.folder / "data" / "MSRVTT", 12, write_clip=write_avi_named_mp4)
    released = checkout.folder / "data" / "checkpoints" / "cc-webvid2m-4f_stformer_b_16_224.pth.tar"
    released.parent.mkdir(parents=True)
    write_released_checkpoint(released, ReleasedModel())
    model = {"text": {"tokenizer": "tower"}}
    changes = {key: value for key, value in SMALL_RUN.items() if key != "model"}
    checkout.shrink("finetune/msrvtt_1kA.yaml", {**changes, "model": model, "curriculum": stages(8)})
    checkout.shrink("eval/_base.yaml", {"model": model, "data": SMALL_RUN["data"]})


def sweeps(checkout: Checkout) -> None:
    path = checkout.folder / "configs" / "sweeps" / "cpu_small.yaml"
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    sweep["overrides"] = [f"curriculum.stages[{stage}].steps=2" for stage in (0, 1)]
    sweep["axes"] = {"curriculum.stages[0].global_batch_size": [4, 8]}
    sweep["trials"] = []
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    small = {"video": {"size": "pico_patch16_32"}, "text": {"name": "tower", "frozen_layers": 0}}
    checkout.shrink("benchmarks/sweep_small.yaml", {"model": small, "curriculum": stages(1, 4)})


def search(checkout: Checkout) -> None:
    """A finished run as runs/demo and runs/mine, clips, a query clip and labels."""
    data = make_data(checkout.folder / "data", videos=6, pictures=2)
    tree = tiny_mapping(data, Path("runs/demo"), curriculum=stages(2))
    tree["curriculum"] = {key: value for key, value in tree["curriculum"].items() if value is not None}
    tree["evaluation"] = {"every": "end", "sources": [{"name": "clips", "path": str(data["videos"])}]}
    (checkout.folder / "tiny.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    checkout.run("frozen-fast train --config tiny.yaml")
    shutil.copytree(checkout.folder / "runs/demo", checkout.folder / "runs/mine", symlinks=True)
    (checkout.folder / "data" / "demo").symlink_to(data["videos"].parent)
    shutil.copy(data["videos"], data["videos"].parent / "test.jsonl")
    clips = checkout.folder / "my_clips"
    clips.mkdir()
    for number in range(2):
        write_clip(clips / f"{number}.avi", number)
    write_clip(checkout.folder / "clip.mp4.avi", 0)
    (checkout.folder / "clip.mp4.avi").rename(checkout.folder / "clip.mp4")
    (checkout.folder / "labels.txt").write_text("dog\ncat\ncar\n", encoding="utf-8")


def write_avi_named_mp4(path: Path, number: int) -> None:
    """A clip of the tests under the name that the data set's layout asks for; readers look at the content."""
    written = path.with_suffix(".avi")
    write_clip(written, number)
    written.rename(path)


TUTORIALS: dict[str, tuple[Callable[[Checkout], None], list[str]]] = {
    "docs/get_started.md": (get_started, ["runs/own_clips/report.html", "own_index/index.json"]),
    "docs/finetuning.md": (finetuning, ["runs/own_clips/report.html", "runs/own_clips_average/config.json"]),
    "docs/tutorials/pretrain_webvid.md": (pretrain, ["runs/webvid_1_4_8/report.html"]),
    "docs/tutorials/finetune_msrvtt.md": (
        finetune_msrvtt,
        ["runs/msrvtt_1kA/report.html", "runs/msrvtt_frozen_text/report.html", "msrvtt_index/index.json"],
    ),
    "docs/launching.md": (launching, ["runs/webvid_1_4_8/report.html"]),
    "docs/sweeps.md": (sweeps, ["runs/sweeps/cpu_small/ranking.md", "runs/sweep_small/report.html"]),
    "docs/search.md": (search, ["my_index/index.json", "page.html", "folder/README.md", "exported/export.json"]),
}
"""Page -> what a reader has before it, and files that exist at its end."""


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_followed_literally_ends_with_what_it_promises(page: str, checkout: Checkout) -> None:
    prepare, results = TUTORIALS[page]
    prepare(checkout)
    checkout.follow(page)
    for result in results:
        assert (checkout.folder / result).is_file(), result


def test_every_tutorial_of_the_site_is_followed() -> None:
    """The pages of the site's Tutorials, and Get started."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    tutorials = re.search(r"  - Tutorials:\n(.*?)\n  - Guides", text, re.DOTALL)
    assert tutorials is not None
    pages = {f"docs/{name}" for name in re.findall(r": (\S+\.md)", tutorials[1])} | {"docs/get_started.md"}
    assert pages == set(TUTORIALS)
