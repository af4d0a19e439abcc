"""train.py's run with every kind of tower on real clips: the loss falls, resuming is exact, the checkpoint loads."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, T5Config

from frozen_fast.config import ExperimentConfig
from frozen_fast.models import DualEncoder
from frozen_fast.models.text.transformers_tower import model_from_config
from frozen_fast.records.checkpoint import read_tensors
from frozen_fast.training.journal import Journal
from frozen_fast.training.run import train
from support.runs import losses, make_data, read_json, tiny_config, without_reports
from support.towers import make_tokenizer

pytestmark = pytest.mark.integration

VIDEO: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "timm_resnet18": ({"tower": "timm", "size": "resnet18", "resolution": 32}, (1, 2)),
    "timm_vit": (
        {"tower": "timm", "size": "vit_tiny_patch16_224", "resolution": 32, "over_time": "transformer"},
        (1, 3),
    ),
    "r2plus1d_18": ({"tower": "torchvision_video", "size": "r2plus1d_18", "resolution": 32}, (2, 4)),
    "s3d": ({"tower": "torchvision_video", "size": "s3d", "resolution": 32}, (8, 9)),
}
"""Tower -> keys of model.video, and the frames of two stages."""

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def no_reports() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"), videos=8, pictures=1)


def experiment(
    data: dict[str, Path], folder: Path, video: dict[str, Any], frames: tuple[int, ...], **text: Any
) -> ExperimentConfig:
    steps = [STEPS // len(frames)] * len(frames)
    return tiny_config(
        data,
        folder,
        model={
            "video": video,
            "text": {"name": str(data["tower"]), "max_tokens": 12, **text},
            "embedding_width": 16,
        },
        curriculum={
            "stages": [
                {"frames": number, "global_batch_size": 8, "steps": count}
                for number, count in zip(frames, steps, strict=True)
            ]
        },
        checkpoints={"keep": 5},
        evaluation={"every": "end", "sources": [{"name": "held_out", "path": str(data["videos"])}]},
    )


def stop_after(step: int, config: ExperimentConfig) -> int:
    """Train, and send this process a SIGTERM when a step has been recorded."""
    original = Journal.add

    def add(self: Journal, result: Any, meter: Any) -> None:
        original(self, result, meter)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", add)
        return train(config)


def check_run(config: ExperimentConfig, again: ExperimentConfig) -> DualEncoder:
    """Train straight and in two halves; the halves equal the whole, its loss falls, and its checkpoint loads."""
    assert train(config) == 0
    curve = losses(Path(config.run_folder))
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.3, curve
    assert stop_after(STEPS // 2 + 1, again) == 75
    assert train(again, resume="auto") == 0
    assert losses(Path(again.run_folder)) == curve
    last = f"checkpoints/step_{STEPS:08d}"
    ours, theirs = (read_tensors(Path(one.run_folder) / last) for one in (again, config))
    assert ours[0].keys() == theirs[0].keys() and ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[0][name], value) for name, value in theirs[0].items())
    for name, tensors in theirs[1].items():
        assert all(torch.equal(ours[1][name][key], value) for key, value in tensors.items()), name
    rows, expected = (read_json(Path(one.run_folder) / "metrics.json")["evaluations"] for one in (again, config))
    assert [row["metrics"] for row in rows] == [row["metrics"] for row in expected] != []
    loaded = DualEncoder.from_pretrained(Path(config.run_folder) / last)
    described = read_json(Path(config.run_folder) / "environment.json")["model"]
    assert described["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VIDEO))
def test_video_towers_train_resume_and_load(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    video, frames = VIDEO[name]
    configs = [experiment(data, tmp_path / folder, video, frames) for folder in ("straight", "halves")]
    loaded = check_run(*configs)
    assert loaded.learned_frames == frames[-1]
    side = loaded.resolution
    assert loaded.encode_video(torch.zeros(1, frames[-1], 3, side, side)).shape == (1, 16)
    stages = read_json(tmp_path / "straight" / "stages.json")
    assert all(stage["flops_per_clip"] > 0 for stage in stages)


def make_encoder(folder: Path, kind: str) -> Path:
    """A T5-shaped or CLIP-text-shaped encoder's config and a tokenizer, as a folder."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config: Any = CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    if kind == "t5":
        config = T5Config(
            vocab_size=size,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.1,
            pad_token_id=0,
        )
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert sum(parameter.numel() for parameter in model_from_config(config).parameters()) > 0
    return folder


@pytest.mark.parametrize(("kind", "pooling"), [("t5", "mean"), ("clip", "eos")])
def test_text_towers_train_resume_and_load(kind: str, pooling: str, data: dict[str, Path], tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder", kind)
    video = {"size": "pico_patch16_32", "attention": "sdpa"}
    text = {"name": str(encoder), "weights": "random"}
    configs = [experiment(data, tmp_path / folder, video, (1, 2), **text) for folder in ("straight", "halves")]
    loaded = check_run(*configs)
    assert loaded.text_model.architecture()["pooling"] == pooling
    assert not any("decoder" in name or "vision" in name for name, _ in loaded.named_parameters())
    alone, padded = (loaded.encode_text(texts) for texts in (["clip one"], ["clip one", "a far longer caption of it"]))
    torch.testing.assert_close(padded[:1], alone, rtol=1e-4, atol=1e-5)
