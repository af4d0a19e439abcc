"""A package outside the tree adds a video tower, a loss, a metric and a data set layout, and train.py uses them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frozen_fast.config import yaml_text
from support.runs import REPOSITORY, environment, losses, read_json, tiny_mapping, write_clip
from support.towers import make_text_tower

ENTRY_POINTS = """[frozen_fast.plugins]
video_towers.conv = outside_parts.conv_tower:ConvTower
losses.hardest_negative = outside_parts.hardest_negative:HardestNegative
metrics.mrr = outside_parts.mean_reciprocal_rank:MRR
layouts.captions_in_names = outside_parts.captions_in_names:CAPTIONS_IN_NAMES
decoders.opencv = outside_parts.opencv_decoder:OPENCV
attention_backends.fp32 = outside_parts.fp32_attention:FP32
"""
CAPTIONS = ["a dog runs", "a cat sleeps", "two people dance", "a car turns", "rain falls", "a ball rolls"]


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An installed distribution made of examples/extend, and clips whose names are their captions."""
    folder = tmp_path_factory.mktemp("outside")
    site = folder / "site"
    package = site / "outside_parts"
    shutil.copytree(REPOSITORY / "examples" / "extend", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("", encoding="utf-8")
    metadata = site / "outside_parts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-parts\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    for split, first in (("train", 0), ("test", 100)):
        (folder / "clips" / split).mkdir(parents=True)
        for number, caption in enumerate(CAPTIONS * (3 if split == "train" else 1)):
            name = f"{caption.replace(' ', '_')}.{first + number:04d}.avi"
            write_clip(folder / "clips" / split / name, number % len(CAPTIONS))
    (folder / "clips" / "train" / "README.txt").write_text("no clip", encoding="utf-8")
    return {"site": site, "clips": folder / "clips", "tower": make_text_tower(folder / "tower")}


def run_train(plugins: dict[str, Any], run_folder: Path, *overrides: str, with_plugins: bool = True) -> Any:
    """train.py in a process that finds the distribution on its path, or does not."""
    tree = tiny_mapping({"tower": plugins["tower"], "videos": Path("unused")}, run_folder)
    source = {"path": str(plugins["clips"]), "format": "manifest", "name": "names"}
    tree["data"]["sources"] = [{**source, "split": "train"}]
    tree["evaluation"] = {"every": "end", "sources": [{**source, "split": "test"}]}
    tree["model"]["video"] = {}  # of another tower than space_time
    tree["curriculum"]["stages"][0]["steps"] = tree["curriculum"]["stages"][1]["steps"] = 40
    tree["optimizer"]["learning_rate"] = 3e-3
    path = run_folder.parent / f"{run_folder.name}.yaml"
    path.write_text(yaml_text.dump(tree), encoding="utf-8")
    variables = environment()
    if with_plugins:
        variables["PYTHONPATH"] += os.pathsep + str(plugins["site"])
    chosen = [
        "model.video.tower=conv",
        "model.video.options={width: 32}",
        "loss.name=hardest_negative",
        "evaluation.metrics=[retrieval, mrr]",
        "evaluation.keep_best=t2v/MRR",
        "data.sources[0].format=captions_in_names",
        "evaluation.sources[0].format=captions_in_names",
    ]
    command = [sys.executable, "train.py", "--config", str(path), *chosen, *overrides]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def test_train_uses_the_parts_of_a_plugin_package(plugins: dict[str, Any], tmp_path: Path) -> None:
    done = run_train(plugins, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    values = losses(tmp_path / "run")
    assert sum(values[-5:]) < 0.9 * sum(values[:5]), values
    (row,) = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    assert 0 < row["metrics"]["t2v/MRR"] <= 100 and row["metrics"]["t2v/R@1"] <= row["metrics"]["t2v/MRR"]
    assert (tmp_path / "run" / "checkpoints" / "best").exists()
    sources = read_json(tmp_path / "run" / "environment.json")["sources"]["names"]
    assert sources["clips"] == 18 and sources["drops"] == {"no number in its name": 1}
    saved = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert read_json(saved / "config.json")["video"]["tower"] == "conv"
    load = "import sys, frozen_fast as ff; print(ff.DualEncoder.from_pretrained(sys.argv[1]).video_model.width)"
    variables = environment()
    variables["PYTHONPATH"] += os.pathsep + str(plugins["site"])
    printed = subprocess.run(
        [sys.executable, "-c", load, str(saved)], env=variables, capture_output=True, text=True, timeout=120
    )
    assert printed.stdout.strip() == "32", printed.stderr


def test_train_uses_a_plugins_decoder_and_attention(plugins: dict[str, Any], tmp_path: Path) -> None:
    """Forty steps by the plugin's parts and forty by the package's own end in the same losses."""
    tower = ["model.video.tower=space_time", "model.video.options={}", "model.video.size=pico_patch16_32"]
    mine = run_train(plugins, tmp_path / "plugin", *tower, "data.decode.backend=opencv", "model.video.attention=fp32")
    assert mine.returncode == 0, mine.stderr
    own = run_train(plugins, tmp_path / "own", *tower, "data.decode.backend=pyav", "model.video.attention=reference")
    assert own.returncode == 0, own.stderr
    chosen = read_json(tmp_path / "plugin" / "environment.json")["attention_backends"]
    assert chosen == [{"backend": "fp32", "how": "model.video.attention"}]
    assert losses(tmp_path / "plugin") == pytest.approx(losses(tmp_path / "own"), rel=1e-3)


def test_without_the_package_the_names_are_unknown(plugins: dict[str, Any], tmp_path: Path) -> None:
    done = run_train(plugins, tmp_path / "run", with_plugins=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.video.tower: got 'conv'" in done.stderr and "loss.name: got 'hardest_negative'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_cannot_be_imported_is_one_line(plugins: dict[str, Any], tmp_path: Path) -> None:
    module = plugins["site"] / "outside_parts" / "hardest_negative.py"
    good = module.read_text(encoding="utf-8")
    module.write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    try:
        done = run_train(plugins, tmp_path / "run")
    finally:
        module.write_text(good, encoding="utf-8")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "loss.name: got 'hardest_negative', a plugin that cannot be loaded (ModuleNotFoundError" in done.stderr


def test_entry_points_and_pages_name_the_same_parts() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs" / "extend").glob("*.md"))
    for line in ENTRY_POINTS.splitlines()[1:]:
        name, _, target = line.partition(" = ")
        assert f'"{name}" = "my_package.{target.removeprefix("outside_parts.")}"' in pages
