"""`frozen-fast evaluate` on a run's checkpoint and on a released file: the run's own numbers again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from frozen_fast import load_model, load_video, transforms
from frozen_fast.cli import main
from frozen_fast.config import ExperimentConfig, config_from_mapping, dump_yaml
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder
from frozen_fast.training.parts import build_frozen_model
from frozen_fast.training.run import evaluate_checkpoint, train
from support.data_set_folders import write_activitynet, write_json
from support.runs import make_data, read_json, tiny_config, tiny_mapping, write_clip

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"), videos=10, pictures=6)


@pytest.fixture(scope="module")
def run(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A finished run of one stage of two frames, evaluated on videos and on pictures."""
    folder = tmp_path_factory.mktemp("run")
    mapping = tiny_mapping(
        data,
        folder,
        curriculum={"stages": [{"frames": 2, "global_batch_size": 5, "steps": 4}]},
        evaluation={
            "every": "end",
            "sources": [
                {"name": "clips", "path": str(data["videos"])},
                {"name": "stills", "path": str(data["pictures"])},
            ],
            "stride_seconds": 0.2,
            "batch_size": 4,
        },
    )
    assert train(config_from_mapping(mapping)) == 0
    return folder, mapping


def test_the_command_repeats_the_runs_numbers(
    run: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mapping = run
    (tmp_path / "config.yaml").write_text(dump_yaml(config_from_mapping(mapping)), encoding="utf-8")
    checkpoint = folder / "checkpoints" / "step_00000004"
    arguments = ["evaluate", "--config", str(tmp_path / "config.yaml"), "--checkpoint", str(checkpoint)]
    assert main([*arguments, "--output", str(tmp_path / "out.json"), "evaluation.average_sources=true"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_json(tmp_path / "out.json")
    expected = read_json(folder / "metrics.json")["evaluations"]
    assert [row["metrics"] for row in printed["evaluations"]] == [row["metrics"] for row in expected]
    assert [(row["source"], row["frames"], row["windows"] > row["num_videos"]) for row in printed["evaluations"]] == [
        ("clips", 2, True),
        ("stills", 1, False),
    ]
    (mean,) = printed["mean_over_sources"]
    recall = [row["metrics"]["t2v/R@1"] for row in expected]
    assert mean["protocol"] == "plain" and mean["metrics"]["t2v/R@1"]["mean"] == pytest.approx(sum(recall) / 2)


def test_frames_can_be_fewer_than_were_learned_and_not_more(run: tuple[Path, dict]) -> None:
    folder, mapping = run
    checkpoint = str(folder / "checkpoints" / "step_00000004")

    def with_frames(frames: int | None) -> ExperimentConfig:
        return config_from_mapping({**mapping, "evaluation": {**mapping["evaluation"], "frames": frames}})

    for frames, shown in ((1, 1), (None, 2)):
        result = evaluate_checkpoint(with_frames(frames), checkpoint)
        assert [row["frames"] for row in result["evaluations"]] == [shown, 1]
    with pytest.raises(UserError, match="^evaluation.frames: got 4; allowed: up to 2, "):
        evaluate_checkpoint(with_frames(4), checkpoint)
    with pytest.raises(UserError, match="^evaluation.frames: got 4; allowed: up to 2"):
        train(with_frames(4), resume="auto")  # more rows would not fit the optimizer's state


def test_other_pixel_statistics_and_a_missing_checkpoint_are_refused(run: tuple[Path, dict]) -> None:
    folder, mapping = run
    other = {**mapping, "data": {**mapping["data"], "augmentation": {"mean": [0.5, 0.5, 0.5]}}}
    with pytest.raises(UserError, match=r"^data.augmentation.mean: got \[0.5, 0.5, 0.5\]; allowed: \[0.485, "):
        evaluate_checkpoint(config_from_mapping(other), str(folder / "checkpoints" / "step_00000004"))
    with pytest.raises(UserError, match="nowhere"):
        evaluate_checkpoint(config_from_mapping(mapping), "nowhere")


def test_a_checkpoint_that_learned_more_frames_than_the_first_stage_keeps_them(
    run: tuple[Path, dict], data: dict[str, Path], tmp_path: Path
) -> None:
    """Finetuning that begins at one frame: the second frame's embedding is neither lost nor expanded anew."""
    start = run[0] / "checkpoints" / "step_00000004"
    learned = DualEncoder.from_pretrained(start).video_model.temporal_embed.detach()
    assert learned.shape[1] == 2 and learned[:, 1].abs().sum() > 0
    config = tiny_config(
        data,
        tmp_path / "run",
        model={"checkpoint": str(start), "video": {"attention": "sdpa"}, "expansion": "bilinear"},
        curriculum={
            "stages": [
                {"frames": 1, "global_batch_size": 5, "steps": 2},
                {"frames": 4, "global_batch_size": 5, "steps": 1, "learning_rate_scale": 1e-6},
            ]
        },
        checkpoints={"keep": 5},
    )
    assert train(config) == 0
    first = DualEncoder.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert first.learned_frames == 2
    kept = first.video_model.temporal_embed.detach()
    assert torch.equal(kept[:, 1], learned[:, 1]) and not torch.equal(kept[:, 0], learned[:, 0])
    last = DualEncoder.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000003")
    expected = torch.lerp(kept[:, :1], kept[:, 1:2], torch.tensor([0.0, 0.25, 0.75, 1.0])[None, :, None])
    assert last.learned_frames == 4
    torch.testing.assert_close(last.video_model.temporal_embed.detach(), expected, atol=1e-6, rtol=0)


def test_paragraphs_of_activitynet_are_ranked_as_by_hand(data: dict[str, Path], tmp_path: Path) -> None:
    """Each video's sentences joined by spaces are one query, cut to max_caption_characters."""
    root = tmp_path / "ActivityNet"
    ids = write_activitynet(root, 6, write_clip)["val"]
    words = ("circle moves", "dog runs to the left", "man jumps", "star turns slowly", "cat", "ball stops at the top")
    annotation = read_json(root / "val_1.json")
    for name, word in zip(ids, words, strict=True):
        annotation[name]["sentences"] = [
            f" a {word}.",
            "then ",
            f" the {word} with one red square and a blue triangle.",
        ]
    write_json(root / "val_1.json", annotation)
    source = {"name": "val", "format": "activitynet", "path": str(root), "split": "val", "split_counts": "off"}
    source |= {"captions": "paragraph", "max_caption_characters": 40}
    config = tiny_config(
        data,
        tmp_path,
        curriculum={"stages": [{"frames": 2, "global_batch_size": 4, "steps": 1}]},
        evaluation={"sources": [source], "stride_seconds": 0.0, "resize": 224},
    )
    build_frozen_model(config, torch.device("cpu")).save_pretrained(tmp_path / "model")
    (row,) = evaluate_checkpoint(config, str(tmp_path / "model"))["evaluations"]
    assert row["protocol"] == "paragraph" and row["num_queries"] == row["num_videos"] == 6

    model = load_model(tmp_path / "model").eval()
    paragraphs = [f"a {word}. then the {word} with one red square and a star."[:40] for word in words]
    assert all(len(paragraph) == 40 for paragraph in paragraphs)
    paths = [root / "Activity_Videos" / f"{name[2:]}.mp4" for name in ids]
    shown = transforms(model, resize=224)
    video = torch.stack([shown(load_video(path, frames=2)) for path in paths])
    with torch.no_grad():
        sim_QV = model.similarity(paragraphs, video)
    ranks = [1 + sum(float(other) > float(sims[own]) for other in sims) for own, sims in enumerate(sim_QV)]
    assert len(set(ranks)) > 1
    assert row["metrics"]["t2v/MnR"] == pytest.approx(sum(ranks) / 6)
    assert row["metrics"]["t2v/R@1"] == pytest.approx(100 * sum(rank == 1 for rank in ranks) / 6)
