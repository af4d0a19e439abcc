"""A classifier's model, task and start: probabilities over views, mixup, classes, class names as head, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast import load_model
from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.data.sources import Clip, Source
from frozen_fast.errors import UserError
from frozen_fast.evaluation.classification import classify
from frozen_fast.models import SpaceTimeTransformer, VideoSize
from frozen_fast.models.classifier import Classifier, ClassNames
from frozen_fast.training.build_classifier import build_classifier, classes_of
from frozen_fast.training.classification_task import ClassAsCaption, ClassificationTask, mixed
from frozen_fast.training.parts import build_frozen_model
from frozen_fast.training.task import build_task
from support.towers import make_text_tower

NAMES = ("falls", "grows", "rises")
SIZE = VideoSize(resolution=32, patch=16, width=16, depth=1, heads=2)


def clip(number: int, label: str | None) -> Clip:
    return Clip(id=f"c{number}", path=f"c{number}.avi", captions=(f"caption {number}",), label=label)


def source(*labels: str | None, classes: tuple[str, ...] = NAMES, name: str = "clips") -> Source:
    return Source(name, "manifest", [clip(number, label) for number, label in enumerate(labels)], classes=classes)


def model(frames: int = 4, **options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(SpaceTimeTransformer(SIZE, max_frames=frames), NAMES, **options).eval()


def video(clips: int = 2, frames: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(clips, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# The model


def test_similarities_are_the_logits_of_the_named_classes() -> None:
    made, clips = model(), video(5)
    logits_VC = made.video_features(clips)["logits"]
    assert logits_VC.shape == (5, 3)
    assert torch.allclose(made.similarity(["rises", "falls"], clips), logits_VC[:, [2, 0]].T)
    assert torch.allclose(made.probabilities(clips), logits_VC.softmax(-1))
    with pytest.raises(UserError, match="^class: got 'shrinks'; allowed: falls, grows, rises"):
        made.similarity(["shrinks"], clips)


def test_views_are_merged_by_their_mean_probabilities() -> None:
    """The mean of probabilities and the mean of logits choose different classes here."""
    logits = torch.tensor([[4.0, 3.9, 0.0], [0.0, 3.9, 4.0], [9.0, 0.0, -9.0]])
    merged = model().merge_windows([{"logits": row[None]} for row in logits])["logits"]
    assert torch.allclose(merged.softmax(-1)[0], logits.softmax(-1).mean(0), atol=1e-6)
    assert merged.exp().sum() == pytest.approx(1.0, abs=1e-5)


def test_a_saved_classifier_comes_back_through_load_model(tmp_path: Path) -> None:
    made = model(dropout=0.25)
    made.save_pretrained(tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert isinstance(back, Classifier) and back.classes == NAMES and back.dropout.p == 0.25
    assert torch.equal(back.probabilities(video()), made.probabilities(video()))
    longer = load_model(tmp_path / "model", num_frames=8, expansion="nearest")
    assert longer.probabilities(video(frames=8)).shape == (2, 3)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["kind"] == "classifier"
    with pytest.raises(UserError, match="^kind: got 'frozen' for .*, which contains a classifier"):
        load_model(tmp_path / "model", kind="frozen")


def test_a_damaged_file_of_a_runs_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    from frozen_fast.common.checksums import write_manifest

    model().save_pretrained(tmp_path)
    write_manifest(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="which is damaged: model.safetensors does not match its checksum"):
        load_model(tmp_path)


@pytest.mark.parametrize("classes", [("one",), ("one", "two", "one")])
def test_classes_are_two_or_more_different_names(classes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="^classes: got .*; allowed: two or more different names"):
        Classifier(SpaceTimeTransformer(SIZE, max_frames=1), classes)


# The task


def experiment(**sections: Any) -> ExperimentConfig:
    return config_from_mapping({"model": {"kind": "classifier"}, **sections})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_cross_entropy(smoothing: float) -> None:
    task = build_task(experiment(classification={"label_smoothing": smoothing}))
    assert isinstance(task, ClassificationTask)
    made, clips = model(), video(4)
    text = ClassNames(NAMES)(["falls", "rises", "rises", "grows"])
    loss, value = task.loss(made, made.text_features(text), made.video_features(clips), {})
    logits_BC = made.video_features(clips)["logits"]
    target_BC = F.one_hot(torch.tensor([0, 2, 2, 1]), 3) * (1 - smoothing) + smoothing / 3
    expected = -(target_BC * logits_BC.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(loss, expected) and torch.allclose(value, expected) and not value.requires_grad


def test_mixup_blends_clips_and_classes_alike() -> None:
    clips, classes = video(6), ClassNames(NAMES)(["falls", "rises", "grows", "falls", "rises", "grows"])["class"]
    torch.manual_seed(3)
    blended, text = mixed(clips, classes, 0.4)
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    order = torch.randperm(6)
    assert 0 < share < 1 and not torch.equal(order, torch.arange(6))
    for row, other in enumerate(order.tolist()):
        assert torch.allclose(blended[row], share * clips[row] + (1 - share) * clips[other], atol=1e-6)
        assert torch.allclose(text["class"][row], share * classes[row] + (1 - share) * classes[other])
    pixels = torch.randint(0, 256, clips.shape, dtype=torch.uint8)
    torch.manual_seed(3)
    rounded, _ = mixed(pixels, classes, 0.4)
    expected = share * pixels.float() + (1 - share) * pixels[order].float()
    assert rounded.dtype == torch.uint8 and (rounded.float() - expected).abs().max() <= 0.5001
    task = build_task(experiment())
    same = task.inputs(clips, {"class": classes})
    assert same[0] is clips and same[1]["class"] is classes, "off by default"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"rerank": ["dual_softmax"]}}, "^evaluation.rerank: got .* with model.kind classifier"),
        ({"evaluation": {"prompts": ["{}"]}}, "^evaluation.prompts: got"),
        ({"loss": {"learnable_temperature": True}}, "^loss.learnable_temperature: got True"),
    ],
)
def test_what_only_retrieval_has_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task(experiment(**sections))


# Classes


def test_a_clips_class_takes_the_place_of_its_captions() -> None:
    clips = ClassAsCaption(source("rises", "falls", None))
    assert [one.captions for one in clips[:2]] == [("rises",), ("falls",)] and clips[0].id == "c0" and len(clips) == 3
    with pytest.raises(UserError, match="^source clips: clip 'c2' has no class"):
        clips[2]


def test_classes_are_those_of_all_sources_or_of_a_file(tmp_path: Path) -> None:
    settings = experiment().classification
    sources = {"a": source("rises", classes=("rises", "falls")), "b": source("grows", classes=("grows",))}
    assert classes_of(settings, sources) == NAMES
    listed = tmp_path / "classes.txt"
    listed.write_text("rises\ngrows\nfalls\nshrinks\n", encoding="utf-8")
    named = experiment(classification={"classes": str(listed)}).classification
    assert classes_of(named, sources) == ("rises", "grows", "falls", "shrinks")
    listed.write_text("rises\ngrows\n", encoding="utf-8")
    with pytest.raises(UserError, match="^classification.classes: got .*, which lacks 'falls'"):
        classes_of(named, sources)
    with pytest.raises(UserError, match="^classification.classes: got .*nothere"):
        classes_of(experiment(classification={"classes": str(tmp_path / "nothere")}).classification, sources)
    with pytest.raises(UserError, match="^data.sources: got 'b' without classes for model.kind classifier"):
        classes_of(settings, {"a": sources["a"], "b": source("x", classes=())})


# How a classifier starts


def retrieval_config(folder: Path, tower: Path) -> ExperimentConfig:
    return config_from_mapping(
        {
            "model": {
                "video": {"size": "pico_patch16_32", "temporal_init_std": 1.0},
                "text": {"name": str(tower), "max_tokens": 12},
                "embedding_width": 16,
            },
            "curriculum": {"stages": [{"frames": 4, "steps": 1}]},
            "run_folder": str(folder),
        }
    )


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrieval checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("retrieval")
    made = build_frozen_model(retrieval_config(folder, make_text_tower(folder / "tower")), torch.device("cpu"))
    with torch.no_grad():
        made.vid_proj[-1].bias.normal_()
    made.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def start(checkpoint: Path | None, frames: int = 4, **classification: Any) -> ExperimentConfig:
    stages = [{"frames": frames, "steps": 1}]
    section: dict[str, Any] = {"kind": "classifier", "checkpoint": None if checkpoint is None else str(checkpoint)}
    if checkpoint is None:
        section["video"] = {"size": "pico_patch16_32"}
    tree = {"model": section, "curriculum": {"stages": stages}, "classification": classification}
    return config_from_mapping(tree)


def test_a_retrieval_checkpoint_gives_its_video_tower(retrieval: Path) -> None:
    sources = {"a": source(*NAMES)}
    made = build_classifier(start(retrieval), sources).eval()
    whole = load_model(retrieval)
    assert torch.equal(made.tower_output(video()), whole.tower_output(video()))
    assert made.mean == whole.mean and made.classes == NAMES and made.learned_frames == 4
    assert build_classifier(start(retrieval, frames=8), sources).learned_frames == 8


@pytest.mark.parametrize("prompts", [("{}",), ("a video of {}", "{} now", "it {}")])
def test_a_head_of_class_names_begins_with_the_accuracy_of_zero_shot(retrieval: Path, prompts: tuple[str, ...]) -> None:
    made = build_classifier(start(retrieval, head="class_names", prompts=prompts), {"a": source(*NAMES)}).eval()
    whole, clips = load_model(retrieval), video(40, seed=5)
    with torch.no_grad():
        logits_VC = made.video_features(clips)["logits"]
        texts = [prompt.format(name) for name in NAMES for prompt in prompts]
        sim_CV = whole.similarity(texts, clips).view(3, len(prompts), -1).mean(1)
    raw = whole.encode_video(clips, normalize=False)
    assert torch.allclose(logits_VC, (sim_CV * raw.norm(dim=-1)).T, atol=1e-5)
    own = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert classify(logits_VC.T, own, NAMES) == classify(sim_CV, own, NAMES)


def test_class_names_need_a_text_tower(tmp_path: Path) -> None:
    sources = {"a": source(*NAMES)}
    with pytest.raises(UserError, match="^classification.head: got 'class_names' without model.checkpoint"):
        build_classifier(start(None, head="class_names"), sources)
    model().save_pretrained(tmp_path / "model")
    other = {"a": source("x", "y", classes=("x", "y"))}
    with pytest.raises(UserError, match="^classification.head: got 'class_names' with a checkpoint that reads no"):
        build_classifier(start(tmp_path / "model", head="class_names"), other)


def test_a_classifier_goes_on_with_its_head_where_the_classes_are_the_same(tmp_path: Path) -> None:
    first = model()
    first.save_pretrained(tmp_path / "model")
    again = build_classifier(start(tmp_path / "model"), {"a": source(*NAMES)})
    assert torch.equal(again.head.weight, first.head.weight)
    moved = build_classifier(start(tmp_path / "model"), {"a": source("x", "y", classes=("x", "y"))})
    assert moved.classes == ("x", "y") and moved.head.weight.shape == (2, 16)
    assert torch.equal(moved.video_model.cls_token, first.video_model.cls_token)
