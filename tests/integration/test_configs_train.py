"""Every experiment file under configs/ trains for two steps, or evaluates, on tiny folders in the published layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from frozen_fast.common.files import read_json_lines
from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.config.fields import to_plain
from frozen_fast.data.sources import karpathy
from frozen_fast.errors import UserError
from frozen_fast.training.run import train
from support.config_data import experiments, small_video_tower, with_data, write_data
from support.datasets import WriteClip
from support.runs import make_data, read_json, without_reports, write_clip, write_picture

CLIPS = 20  # a split; five folds of four pictures for COCO's 1k protocol


def copied(folder: Path, suffix: str, write: WriteClip) -> WriteClip:
    """Write four files once and copy them, whatever suffix the copy has: decoders go by the content."""
    files = [folder / f"{number}{suffix}" for number in range(4)]
    folder.mkdir()
    for number, file in enumerate(files):
        write(file, number)

    def write_copy(path: Path, number: int) -> None:
        path.write_bytes(files[number % len(files)].read_bytes())

    return write_copy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    clip = copied(root / "clips", ".avi", write_clip)
    picture = copied(root / "pictures", ".png", write_picture)
    write_data(root, experiments(), CLIPS, clip=clip, picture=picture)
    return root


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tower"), videos=1, pictures=1)["tower"]


def tiny(config: ExperimentConfig, tower: Path, run_folder: Path) -> ExperimentConfig:
    """The experiment at two or three optimizer steps, with a pico tower and a small random text tower."""
    tree = to_plain(config)
    tree["run_folder"] = str(run_folder)
    tree["model"]["checkpoint"] = None
    tree["model"]["video"].update(small_video_tower(config), weights="none")
    tree["model"]["text"].update(
        name=str(tower), weights="random", tokenizer=None, max_tokens=12, pooling="cls", frozen_layers=0
    )
    tree["optimizer"]["groups"] = []  # they name blocks that a pico tower lacks; test_optimizer.py tests them
    tree["distillation"]["teachers"] = []
    tree["classification"]["head"] = "random"  # class names need the checkpoint
    tree["data"]["decode"].update(backend="pyav", threads=1)
    stages = tree["curriculum"]["stages"]
    tree["curriculum"].update(budget_epochs=None, budget_clips=None)
    for stage in stages:
        sizes = {name: 4 for name in stage["batch_sizes"]}
        stage.update(share=None, steps=2 if len(stages) == 1 else 1, global_batch_size=4, batch_sizes=sizes)
    tree["training"].update(device="cpu", precision="fp32", expected_world_size=None)
    tree["checkpoints"]["every_steps"] = 0
    tree["evaluation"].update(every="end", frames=None, resize=36, stride_seconds=0.0, batch_size=8)
    if not tree["data"]["sources"]:  # an evaluation: train on its own clips, then evaluate as it says
        tree["data"]["sources"] = tree["evaluation"]["sources"][:1]
        tree["curriculum"]["stages"] = [{"frames": 4, "global_batch_size": 4, "steps": 2}]
    return config_from_mapping(tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_trains_and_evaluates(
    name: str, data: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(karpathy, "FOLD", CLIPS // 5)
    config = tiny(with_data(name, data), tower, tmp_path / "run")
    with without_reports():
        assert train(config) == 0
    steps = read_json_lines(tmp_path / "run" / "steps.jsonl")
    assert len(steps) == sum(stage.steps or 0 for stage in config.curriculum.stages)
    rows = read_json(tmp_path / "run" / "metrics.json")
    rows = rows["evaluations"] if isinstance(rows, dict) else rows
    assert {row["source"] for row in rows} == {source.name for source in config.evaluation.sources}
    if config.evaluation.sources and config.evaluation.sources[0].captions == "paragraph":
        assert {row["protocol"] for row in rows} == {"paragraph"}


@pytest.mark.slow
def test_rerankings_are_reported_apart(data: Path, tower: Path, tmp_path: Path) -> None:
    tree = to_plain(tiny(with_data("finetune/msvd.yaml", data), tower, tmp_path / "run"))
    tree["evaluation"].update(rerank=["dual_softmax", "qb_norm"], querybank_size=7)
    with without_reports():
        assert train(config_from_mapping(tree)) == 0
    rows = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    held = [row for row in rows if "reranked" in row]
    assert {row["source"] for row in held} == {"msvd_val", "msvd_test"} and len(rows) == 2 * len(held)
    for row in held:
        assert row["protocol"] == "several_captions" and "t2v/R@1" in row["metrics"]
        assert {name: len(metrics) for name, metrics in row["reranked"].items()} == {"dual_softmax": 14, "qb_norm": 7}


@pytest.mark.slow
def test_a_source_with_classes_is_classified_by_prompts(data: Path, tower: Path, tmp_path: Path) -> None:
    config = tiny(with_data("eval/ucf101.yaml", data), tower, tmp_path / "run")
    with without_reports():
        assert train(config) == 0
    rows = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    found = [row["classification"] for row in rows if "classification" in row]
    assert len(found) == 3, "one for each split"
    for one in found:
        assert one["classes"] == ["apply eye makeup", "archery", "wall pushups"] and one["clips"] == CLIPS
        assert sum(map(sum, one["confusion"])) == CLIPS and one["top5"] == 100.0


@pytest.mark.slow
def test_a_linear_head_is_fitted_on_the_split_that_belongs(data: Path, tower: Path, tmp_path: Path) -> None:
    config = tiny(with_data("eval/hmdb51_linear.yaml", data), tower, tmp_path / "run")
    with without_reports():
        assert train(config) == 0
    rows = read_json(tmp_path / "run" / "metrics.json")["evaluations"]
    found = [row["linear_head"] for row in rows if "linear_head" in row]
    assert len(found) == 3
    for one in found:
        assert one["classes"] == ["brush hair", "cartwheel"] and one["clips"] == CLIPS
    tree = to_plain(config)
    tree["data"]["sources"] = tree["data"]["sources"][:1]
    tree["run_folder"] = str(tmp_path / "second")
    with without_reports(), pytest.raises(UserError, match="evaluation.linear_head: got true without an entry"):
        train(config_from_mapping(tree))
