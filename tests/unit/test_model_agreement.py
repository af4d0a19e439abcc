"""With model.checkpoint the checkpoint says what the model is: contradictions are refused, unset keys are filled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.cli.main import main
from frozen_fast.config import ExperimentConfig, config_from_mapping, load_config
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder, VideoSize
from frozen_fast.training.parts import build_model, load_model
from support.released import ReleasedModel, write_released_checkpoint
from support.towers import make_text_tower

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def folder(text_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a pico tower that has learned four frames."""
    config = experiment(
        {
            "video": {"size": "pico_patch16_32", "block": "timesformer"},
            "text": {"name": str(text_tower)},
            "embedding_width": 24,
            "text_activation": "none",
        },
        frames=4,
    )
    path = tmp_path_factory.mktemp("checkpoint")
    build_model(config, CPU).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_released_checkpoint(tmp_path_factory.mktemp("released") / "x.pth.tar", ReleasedModel())


def experiment(model: dict[str, Any], frames: int = 4, **sections: Any) -> ExperimentConfig:
    stages = {"stages": [{"frames": frames, "global_batch_size": 2, "steps": 1}]}
    return config_from_mapping({"model": model, "curriculum": stages, **sections})


def test_what_is_not_said_comes_from_the_checkpoint(folder: Path) -> None:
    model = build_model(experiment({"checkpoint": str(folder)}), CPU)
    assert isinstance(model, DualEncoder)
    assert model.video_model.size == VideoSize(resolution=32, patch=16, width=64, depth=2, heads=2)
    assert model.video_model.block == "timesformer"
    assert (model.embedding_width, model.text_activation) == (24, "none")
    assert model.tokenizer is not None and model.tokenizer.max_tokens == 64


def test_what_is_said_and_agrees_is_accepted(folder: Path, text_tower: Path) -> None:
    said = {
        "video": {"tower": "space_time", "size": "pico_patch16_32", "block": "timesformer"},
        "text": {"tower": "transformers", "name": str(text_tower), "max_tokens": 9},
        "embedding_width": 24,
        "text_activation": "none",
    }
    model = build_model(experiment({"checkpoint": str(folder), **said}), CPU)
    assert model.tokenizer is not None and model.tokenizer.max_tokens == 9


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"video": {"size": "nano_patch16_64"}}, "model.video.size: got 'nano_patch16_64'; allowed: pico_patch16_32"),
        ({"video": {"block": "frozen_in_time"}}, "model.video.block: got 'frozen_in_time'; allowed: 'timesformer'"),
        ({"video": {"skip_time_attention_at_one_frame": True}}, "skip_time_attention_at_one_frame: got True"),
        ({"video": {"tower": "timm"}}, "model.video.tower: got 'timm'; allowed: 'space_time'"),
        ({"video": {"over_time": "mean"}}, "model.video.over_time: got 'mean'; allowed: nothing, the tower space_time"),
        ({"embedding_width": 256}, "model.embedding_width: got 256; allowed: 24"),
        ({"text_activation": "relu"}, "model.text_activation: got 'relu'; allowed: 'none'"),
        ({"text": {"pooling": "mean"}}, "model.text.pooling: got 'mean'; allowed: auto or cls"),
        ({"text": {"name": "bert-base-uncased"}}, "model.text.name: got 'bert-base-uncased' .bert of width 768"),
    ],
)
def test_a_contradiction_is_refused_in_training_and_evaluation(
    folder: Path, said: dict[str, Any], message: str
) -> None:
    config = experiment({"checkpoint": str(folder), **said})
    for build in (lambda: build_model(config, CPU), lambda: load_model(config, folder, CPU)):
        with pytest.raises(UserError, match=message):
            build()


def test_an_unknown_size_is_refused_with_a_checkpoint_too() -> None:
    with pytest.raises(UserError, match="model.video.size: got 'garbage'"):
        experiment({"checkpoint": "x", "video": {"size": "garbage"}})


def test_initial_values_that_a_checkpoint_leaves_no_use_for_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment({"checkpoint": str(folder), "video": {"weights": "timm:vit_base_patch16_224"}})
    with caplog.at_level(logging.INFO):
        build_model(config, CPU)
    assert "model.checkpoint gives the weights; not used: model.video.weights" in caplog.text


def test_a_folder_from_before_there_were_towers_still_loads(folder: Path, tmp_path: Path) -> None:
    DualEncoder.from_pretrained(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["video"].pop("tower") == "space_time" and config["text"].pop("tower") == "transformers"
    config["text"].pop("name")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    video = torch.randn(1, 4, 3, 32, 32)
    old, new = DualEncoder.from_pretrained(tmp_path), DualEncoder.from_pretrained(folder)
    assert torch.equal(old.encode_video(video), new.encode_video(video))


@pytest.mark.parametrize("name", ["finetune/msrvtt_1kA", "finetune/msrvtt_1kA_4"])
def test_a_shipped_finetuning_config_starts_from_a_released_file(name: str, released: Path, text_tower: Path) -> None:
    overrides = [f"model.checkpoint={released}", "training.device=cpu"]
    config = load_config(ROOT / f"configs/{name}.yaml", [*overrides, f"model.text.tokenizer={text_tower}"])
    model = build_model(config, CPU)
    assert model.training and model.learned_frames == config.curriculum.stages[0].frames
    assert model.tokenizer is not None and model.tokenizer.max_tokens == 64


def test_the_tokenizer_of_a_released_file_is_its_text_towers_own(
    tmp_path: Path, text_tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training as in evaluation, where none is named: distilbert-base-uncased's or bert-base-uncased's."""
    from frozen_fast.models import from_config
    from frozen_fast.models.text.transformers_tower import load_tokenizer

    asked = []

    def load(name: str, max_tokens: int) -> Any:
        asked.append(name)
        return load_tokenizer(str(text_tower), max_tokens)

    monkeypatch.setattr(from_config, "load_tokenizer", load)
    for kind in ("distilbert", "bert"):
        path = write_released_checkpoint(tmp_path / f"{kind}.pth", ReleasedModel(text=kind, vocabulary=30522))
        assert build_model(experiment({"checkpoint": str(path)}), CPU).tokenizer is not None
        assert load_model(experiment({}), path, CPU).tokenizer is not None
    assert asked == ["distilbert-base-uncased"] * 2 + ["bert-base-uncased"] * 2


def test_without_any_tokenizer_training_says_which_key_names_one(released: Path) -> None:
    with pytest.raises(UserError, match="model.text.tokenizer: got none, and the checkpoint has none.*package:"):
        build_model(experiment({"checkpoint": str(released)}), CPU)


def test_heads_of_a_released_file_are_guessed_aloud_and_can_be_set(
    released: Path, text_tower: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = {"tokenizer": str(text_tower)}
    model = build_model(experiment({"checkpoint": str(released), "text": text}), CPU)
    assert isinstance(model, DualEncoder)
    assert model.video_model.size.heads == 2
    assert "using 2 (width 128 / 64); model.video.heads sets it" in caplog.text
    assert "using 2 (width 128 / 64); model.text.heads sets it" in caplog.text
    said = {"checkpoint": str(released), "video": {"heads": 4}, "text": {**text, "heads": 8}}
    model = build_model(experiment(said), CPU)
    assert isinstance(model, DualEncoder)
    assert (model.video_model.size.heads, model.text_model.config.n_heads) == (4, 8)
    with pytest.raises(UserError, match="model.video.heads: got 3; allowed: a divisor of 128"):
        build_model(experiment({"checkpoint": str(released), "video": {"heads": 3}, "text": text}), CPU)


def test_evaluation_takes_the_frames_of_the_checkpoint_and_no_more(released: Path, text_tower: Path) -> None:
    config = load_config(ROOT / "configs/eval/msrvtt_1kA.yaml", [f"model.text.tokenizer={text_tower}"])
    assert config.evaluation.frames is None
    section = {"checkpoint": str(released), "text": {"tokenizer": str(text_tower)}}
    assert load_model(experiment(section), released, CPU).learned_frames == 4
    for frames, build in ((8, load_model), (8, None)):
        config = experiment(section, evaluation={"frames": frames})
        with pytest.raises(UserError, match="evaluation.frames: got 8; allowed: up to 4"):
            build_model(config, CPU) if build is None else build(config, released, CPU)


def test_evaluation_frames_above_every_stage_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        "data: {sources: [{path: nowhere.jsonl}]}\nevaluation: {frames: 8}\n"
        "curriculum: {stages: [{frames: 4, steps: 1}]}\n"
    )
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: evaluation.frames: got 8; allowed: up to 4, the largest")


def test_converting_without_a_tokenizer_warns(
    released: Path, text_tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-checkpoint", str(released), str(tmp_path / "a")]) == 0
    assert "warning: no tokenizer was saved" in capsys.readouterr().err
    assert main(["convert-checkpoint", str(released), str(tmp_path / "b"), "--tokenizer", str(text_tower)]) == 0
    assert capsys.readouterr().err == ""
