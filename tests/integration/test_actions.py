"""Action recognition by finetuning: classes that one frame cannot tell apart, and everything an engine's run has."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast import load_model
from frozen_fast.cli.main import main
from frozen_fast.config import ExperimentConfig, config_from_mapping, dump_yaml
from frozen_fast.data import read_source
from frozen_fast.data.load.for_model import build_evaluation_loader
from frozen_fast.data.load.video_frames import format_of
from frozen_fast.errors import UserError
from frozen_fast.models.classifier import Classifier
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.report.write_report import write_report
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import evaluate_checkpoint, train
from support.action_runs import mapping, row_of
from support.data_set_folders import write_hmdb51
from support.ordered_clips import CLASSES, make_ordered
from support.runs import REPOSITORY, environment, losses, read_json, without_reports, write_clip

pytestmark = pytest.mark.integration

TRAIN, TEST = 96, 42


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("orders")
    return {
        "train": make_ordered(folder / "train", CLASSES * (TRAIN // len(CLASSES))),
        "test": make_ordered(folder / "test", CLASSES * (TEST // len(CLASSES)), first=10_000),
    }


def experiment(data: dict[str, Path], folder: Path, **sections: Any) -> ExperimentConfig:
    return config_from_mapping(mapping(data, folder, **sections))


def learned(data: dict[str, Path], folder: Path, stages: list[dict[str, Any]]) -> Path:
    config = experiment(
        data, folder, curriculum={"stages": stages}, optimizer={"learning_rate": 2e-3, "schedule": "cosine"}
    )
    with without_reports():
        assert train(config) == 0
    return folder


@pytest.mark.slow
def test_orders_are_learned_from_several_frames_and_not_from_one(data: dict[str, Path], tmp_path: Path) -> None:
    """One frame gives chance (16.7 %), a curriculum that ends at four frames above 90 %; top-k is a count by hand."""
    one = row_of(learned(data, tmp_path / "one", [{"frames": 1, "global_batch_size": 16, "steps": 60}]))
    stages = [{"frames": 1, "global_batch_size": 16, "steps": 20}, {"frames": 4, "global_batch_size": 32, "steps": 300}]
    run = learned(data, tmp_path / "four", stages)
    row = row_of(run)
    assert one["metrics"]["top1"] < 40.0, "chance is 16.7 %"
    assert row["metrics"]["top1"] > 90.0 and row["protocol"] == "classification" and row["frames"] == 4

    model = load_model(run)
    assert isinstance(model, Classifier) and model.classes == tuple(sorted(CLASSES)) and model.learned_frames == 4
    source = read_source(experiment(data, tmp_path).evaluation.sources[0])
    config = experiment(data, tmp_path)
    loader = build_evaluation_loader(
        source,
        format_of(model),
        evaluation=config.evaluation,
        decode=config.data.decode,
        device=torch.device("cpu"),
        frames=4,
    )
    right = right5 = 0
    confusion = [[0] * 6 for _ in CLASSES]
    for batch in loader.batches():
        assert isinstance(batch.windows, torch.Tensor)
        for clip, probabilities in zip(batch.clip_indices, model.probabilities(batch.windows).tolist(), strict=True):
            own = model.classes.index(str(source.clips[clip].label))
            order = sorted(range(6), key=lambda number: -probabilities[number])
            right, right5 = right + (order[0] == own), right5 + (own in order[:5])
            confusion[own][order[0]] += 1
    assert row["metrics"]["top1"] == pytest.approx(100 * right / TEST)
    assert row["metrics"]["top5"] == pytest.approx(100 * right5 / TEST)
    assert row["finetuned"]["confusion"] == confusion
    write_report(run)
    report = (run / "report.md").read_text(encoding="utf-8")
    assert (
        "## Action recognition" in report and "## Retrieval" not in report and "Top-1 on held_out, 4 frames" in report
    )


def test_a_run_that_was_stopped_gives_the_same_bits(data: dict[str, Path], tmp_path: Path) -> None:
    """With mixup, dropout, label smoothing, a frozen block, a faster head, and 1 => 4 frames."""
    sections: dict[str, Any] = {
        "classification": {"mixup": 0.4, "dropout": 0.2, "label_smoothing": 0.1},
        "curriculum": {
            "stages": [
                {"frames": 1, "global_batch_size": 8, "steps": 3},
                {"frames": 4, "global_batch_size": 8, "steps": 4},
            ]
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "groups": [
                {"match": "video_model.blocks.0.*", "frozen": True},
                {"match": "head.*", "learning_rate_scale": 5.0},
            ],
        },
    }
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    add = Journal.add

    def stop_after_five(self: Journal, result: Any, meter: Any) -> None:
        add(self, result, meter)
        if result.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with without_reports() as patch:
        assert train(experiment(data, straight, **sections)) == 0
        patch.setattr(Journal, "add", stop_after_five)
        assert train(experiment(data, stopped, **sections)) == 75
        patch.setattr(Journal, "add", add)
        assert train(experiment(data, stopped, **sections), resume="auto") == 0
    assert losses(stopped) == losses(straight)
    assert row_of(stopped)["finetuned"] == row_of(straight)["finetuned"]
    ours, expected = (read_tensors(run / "checkpoints" / "step_00000007")[0] for run in (stopped, straight))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_evaluate_command_gives_the_runs_numbers(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "experiment.yaml"
    config = experiment(data, run, evaluation={**mapping(data, run)["evaluation"], "keep_best": "top1"})
    file.write_text(dump_yaml(config), encoding="utf-8")
    with without_reports():
        assert main(["train", "--config", str(file)]) == 0
    (expected,) = read_json(run / "metrics.json")["evaluations"]
    capsys.readouterr()
    output = tmp_path / "numbers.json"
    assert main(["evaluate", "--config", str(file), "--checkpoint", str(run), "--output", str(output)]) == 0
    (row,) = read_json(output)["evaluations"]
    assert row["finetuned"] == expected["finetuned"] and row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert os.readlink(run / "checkpoints" / "best") == "step_00000006"


def test_three_crops_are_three_views_of_each_window(data: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with without_reports():
        assert train(experiment(data, run)) == 0
    base = mapping(data, run)["evaluation"]
    one = evaluate_checkpoint(experiment(data, run), str(run))["evaluations"][0]
    three = evaluate_checkpoint(experiment(data, run, evaluation={**base, "crops": 3}), str(run))["evaluations"][0]
    assert (one["windows"], three["windows"]) == (TEST, 3 * TEST)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5), "the three crops of a square clip are one"


def test_mistakes_are_told_by_their_key(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^evaluation.keep_best: got 't2v/R@1'; allowed: .*top1"):
        train(
            experiment(
                data, tmp_path / "metric", evaluation={**mapping(data, tmp_path)["evaluation"], "keep_best": "t2v/R@1"}
            )
        )
    few = tmp_path / "classes.txt"
    few.write_text("red then green then blue\nred then blue then green\n", encoding="utf-8")
    with pytest.raises(UserError, match="^classification.classes: got .*, which lacks 'blue then green then red'"):
        train(experiment(data, tmp_path / "classes", classification={"classes": str(few)}))
    with pytest.raises(UserError, match="^model.checkpoint|^--checkpoint|^checkpoint"):
        evaluate_checkpoint(experiment(data, tmp_path), str(tmp_path / "nothing"))


def test_splits_are_trained_evaluated_and_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two splits of an HMDB51 folder of 12 clips; a video that split 1 tests is in no list of split 2."""
    root, runs, file = tmp_path / "HMDB51", tmp_path / "runs", tmp_path / "experiment.yaml"
    write_hmdb51(root, 6, write_clip)
    unused = root / "testTrainMulti_7030_splits" / "cartwheel_test_split2.txt"
    unused.write_text(unused.read_text(encoding="utf-8").replace("cartwheel_test_1.avi 2", "cartwheel_test_1.avi 0"))
    source = {"format": "hmdb51", "path": str(root), "split_version": "1", "split_counts": "off"}
    tree = mapping({"train": root, "test": root}, runs)
    tree["data"]["sources"] = [{"name": "hmdb51", "split": "train", **source}]
    tree["evaluation"]["sources"] = [{"name": "held_out", "split": "test", **source}]
    tree["curriculum"] = {"stages": [{"frames": 2, "global_batch_size": 4, "steps": 1}]}
    file.write_text(dump_yaml(config_from_mapping(tree)), encoding="utf-8")
    assert main(["train", "--config", str(file), "--splits", "1,2"]) == 0
    rows = [row_of(runs / f"split_{number}") for number in (1, 2)]
    assert [row["finetuned"]["clips"] for row in rows] == [6, 5]
    top1 = [row["metrics"]["top1"] for row in rows]
    (trained,) = read_json(runs / "splits.json")
    assert trained["mean"]["top1"] == pytest.approx(sum(top1) / 2) and trained["splits"] == [1, 2]

    evaluate = ["evaluate", "--config", str(file), "--checkpoint", str(runs), "--splits", "1,2"]
    assert main([*evaluate, "--output", str(tmp_path / "out.json")]) == 0
    found = read_json(tmp_path / "out.json")
    assert [(one["split"], Path(one["checkpoint"]).name) for one in found["splits"]] == [(1, "split_1"), (2, "split_2")]
    (mean,) = found["mean_over_splits"]
    assert (mean["source"], mean["protocol"]) == ("held_out", "classification")
    assert mean["metrics"]["top1"]["mean"] == pytest.approx(trained["mean"]["top1"])
    assert mean["metrics"]["top1"]["deviation"] == pytest.approx(trained["deviation"]["top1"])

    capsys.readouterr()
    assert main([*evaluate[:-1], "1,3"]) == 2
    assert re.search("^error: --splits: got '1,3', but '.*split_3' does not exist", capsys.readouterr().err)
    one_run = [*evaluate[:4], str(runs / "split_1"), *evaluate[5:], "--output", str(tmp_path / "one.json")]
    assert main(one_run) == 0
    clips = [one["evaluations"][0]["finetuned"]["clips"] for one in read_json(tmp_path / "one.json")["splits"]]
    assert clips == [6, 5], "one checkpoint on the test set of each split"


STRATEGIES = ["cpu_2", "cpu_2_zero2", "cpu_2_fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_compute_what_one_does(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "curriculum": {
            "stages": [
                {"frames": 1, "global_batch_size": 8, "steps": 3},
                {"frames": 4, "global_batch_size": 8, "steps": 3},
            ],
            "gradient_accumulation_steps": 2,
        },
        "classification": {"label_smoothing": 0.1},
        "optimizer": {"learning_rate": 1e-4, "gradient_clip_norm": 1.0, "weight_decay": 0.1},
    }
    alone, together = tmp_path / "alone", tmp_path / "together"
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(experiment(data, together, **sections)), encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(REPOSITORY / f"configs/accelerate/{name}.yaml"), str(REPOSITORY / "train.py"), "--config", str(file)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with without_reports():
        assert train(experiment(data, alone, **sections)) == 0
    assert losses(together) == pytest.approx(losses(alone), rel=2e-4)
    ours, expected = row_of(together), row_of(alone)
    assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-4)
    assert ours["finetuned"]["clips"] == expected["finetuned"]["clips"] == TEST
