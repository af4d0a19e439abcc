"""Distillation: teachers of each kind, the loss that follows them, and a student that they help."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from frozen_fast.cli.main import main
from frozen_fast.common.files import read_json_lines
from frozen_fast.config import config_from_mapping, dump_yaml
from frozen_fast.data.features.convert_features import convert_features
from frozen_fast.data.features.feature_store import FeatureStore
from frozen_fast.data.load.feature_loader import read_caption_masks
from frozen_fast.errors import UserError
from frozen_fast.losses import gathered_loss
from frozen_fast.losses.distillation import TEACHERS, SimilarityDistillation
from frozen_fast.training.run import train
from frozen_fast.training.teachers import PickleTeacher, student_video
from support.expert_features import planted_features, write_released_layout
from support.runs import losses, make_data, read_json, tiny_mapping

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXPERTS = {"scene.densenet161.0": (24, False), "face": (20, False)}
VIDEOS = [f"video{number}" for number in range(200)]
TRAIN = VIDEOS[:160]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text features "clean", and "noisy": half of the training videos' captions tell of another video."""
    folder = tmp_path_factory.mktemp("features")
    settings: dict[str, Any] = {"text_width": 18, "noise": 0.1, "hidden": 8}
    features, clean, words = planted_features(VIDEOS, EXPERTS, **settings)
    wrong = planted_features(VIDEOS, EXPERTS, wrong_captions=0.5, **settings)[1]
    noisy = {video: wrong[video] if video in TRAIN else clean[video] for video in VIDEOS}
    splits = {"train_list": TRAIN, "val_list": VIDEOS[160:]}
    root = write_released_layout(folder / "released", features, {"clean": clean, "noisy": noisy}, words, splits)
    convert_features(root, folder / "store", list(EXPERTS), ["clean", "noisy"])
    return folder / "store"


def experiment(store: Path, run_folder: Path, text: str, seed: int, teachers: list[dict[str, Any]], epochs: int):
    experts = [{"name": name, "width": width} for name, (width, _) in EXPERTS.items()]
    source = {"format": "features", "path": str(store)}
    return config_from_mapping(
        {
            "name": run_folder.name,
            "run_folder": str(run_folder),
            "seed": seed,
            "model": {
                "kind": "collaborative_experts",
                "experts": {
                    "experts": experts,
                    "width": 32,
                    "text": text,
                    "text_width": 18,
                    "text_clusters": 3,
                    "max_text_tokens": 8,
                },
            },
            "data": {"sources": [{**source, "name": "train", "split": "train_list"}]},
            "curriculum": {"stages": [{"global_batch_size": 40, "share": 1.0}], "budget_epochs": epochs},
            "optimizer": {"name": "radam", "learning_rate": 0.003},
            "loss": {"name": "max_margin", "margin": 0.2},
            "distillation": {"teachers": teachers, "weight": 20.0},
            "training": {"device": "cpu", "precision": "fp32"},
            "checkpoints": {"every_steps": 0},
            "evaluation": {"every": "end", "sources": [{**source, "name": "val", "split": "val_list"}]},
        }
    )


def recall(folder: Path) -> float:
    return read_json(folder / "metrics.json")["evaluations"][0]["metrics"]["t2v/R@1"]


def test_a_student_of_noisy_captions_gains_by_a_teacher(store: Path, tmp_path: Path) -> None:
    assert train(experiment(store, tmp_path / "teacher", "clean", 0, [], 40)) == 0
    teachers = [{"checkpoint": str(tmp_path / "teacher")}]
    check_masks(store, tmp_path)
    found: dict[str, list[float]] = {"alone": [], "taught": []}
    for seed in range(3):
        for name, given in (("alone", []), ("taught", teachers)):
            folder = tmp_path / f"{name}_{seed}"
            assert train(experiment(store, folder, "noisy", seed, given, 25)) == 0
            found[name].append(recall(folder))
    assert np.mean(found["taught"]) > np.mean(found["alone"]) + 3, found


def check_masks(store: Path, tmp_path: Path) -> None:
    """The teacher keeps nearly all captions that tell of their own video, and few of the others."""
    config = experiment(store, tmp_path / "masks", "noisy", 0, [], 1)
    (tmp_path / "masks.yaml").write_text(dump_yaml(config), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "masks.yaml"), "--checkpoint", str(tmp_path / "teacher")]
    output = tmp_path / "masks.pkl"
    assert main(["make-caption-masks", *arguments, "--rank-below", "5", "--output", str(output)]) == 0
    masks = pickle.loads(output.read_bytes())
    clean, noisy = (FeatureStore(store), "clean"), (FeatureStore(store), "noisy")
    assert set(masks) == set(TRAIN) and min(map(sum, masks.values())) >= 1
    right, wrong = [], []
    for video, mask in masks.items():
        hidden = np.mean([tokens.mean(0) for tokens in clean[0].caption_tokens(clean[1], video)], axis=0)
        for kept, tokens in zip(mask, noisy[0].caption_tokens(noisy[1], video), strict=True):
            told_right = np.abs(tokens.mean(0) - hidden).mean() < 0.2
            (right if told_right else wrong).append(kept)
    assert len(right) > 100 and len(wrong) > 100
    assert np.mean(right) > 0.8 and np.mean(wrong) < 0.3
    assert min(len(indices) for indices in read_caption_masks(output).values()) >= 1


def test_released_embeddings_teach(store: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = {
        video: {
            "vid_embds": {name: rng.normal(size=4).astype(np.float32) for name in EXPERTS},
            "text_embds": {name: rng.normal(size=(3, 4)).astype(np.float32) for name in EXPERTS},
        }
        for video in TRAIN
    }
    path = tmp_path / "teacher.pkl"
    path.write_bytes(pickle.dumps(entries))

    class Batch:
        clip_ids = ["video3", "video8"]
        caption_indices = [2, 0]

    teacher = PickleTeacher(path, torch.device("cpu"))
    text, video = teacher.features(Batch())
    got = teacher.compare(text, video)[0]
    for i, (own, caption) in enumerate(zip(Batch.clip_ids, Batch.caption_indices, strict=True)):
        for j, other in enumerate(Batch.clip_ids):
            want = sum(
                entries[own]["text_embds"][name][caption] @ entries[other]["vid_embds"][name] for name in EXPERTS
            )
            assert float(got[i, j]) == pytest.approx(float(want), rel=1e-5)
    assert train(experiment(store, tmp_path / "run", "clean", 0, [{"pickle": str(path)}], 2)) == 0
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"video1": {"vid_embds": {}}}))
    with pytest.raises(UserError, match="contains no vid_embds and text_embds"):
        train(experiment(store, tmp_path / "wrong", "clean", 0, [{"pickle": str(tmp_path / "other.pkl")}], 2))


def test_the_loss_is_smooth_l1_of_all_pairs() -> None:
    text, video = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    target = 2 * torch.randn(5, 5)

    def compare(a: dict, b: dict) -> torch.Tensor:
        return (a["x"] @ b["x"].T)[None]

    for chunk in (0, 2):
        total, value = gathered_loss(
            compare, SimilarityDistillation(1.0), {"x": text}, {"x": video}, {TEACHERS: target}, chunk_rows=chunk
        )
        want = F.smooth_l1_loss(text @ video.T, target)
        torch.testing.assert_close(total, want)
        torch.testing.assert_close(value, want.detach())


def test_the_students_frames_are_one_of_each_part() -> None:
    video = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 3, 4, 4)
    seen = set()
    for _ in range(60):
        picked = student_video(video, 2)[0, :, 0, 0, 0].tolist()
        assert picked[0] in range(4) and picked[1] in range(4, 8)
        seen.update(picked)
    assert seen == set(range(8))
    assert student_video(video, 8) is video


def test_a_frozen_model_of_more_frames_teaches_one_of_fewer(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = make_data(tmp_path_factory.mktemp("clips"))

    def run(name: str, frames: int, **sections: Any) -> Callable[[], list[float]]:
        stages = {"stages": [{"frames": frames, "global_batch_size": 4, "steps": 3}]}
        mapping = tiny_mapping(files, tmp_path / name, curriculum=stages, **sections)
        assert train(config_from_mapping(mapping)) == 0
        return lambda: losses(tmp_path / name)

    run("teacher", 4)
    taught = {"teachers": [{"checkpoint": str(tmp_path / "teacher"), "frames": 4}]}
    free = run("free", 1, distillation={**taught, "weight": 0.0})()
    student = run("student", 1, distillation=taught)()
    assert student[0] > free[0] > 0, "the same frames and captions, and the teacher's loss on top"
    assert [row["frames"] for row in read_json_lines(tmp_path / "student" / "steps.jsonl")] == [1, 1, 1]
