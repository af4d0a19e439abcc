"""CLIP's towers in the dual encoder: CLIP4Clip's meanP and seqTransf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import frozen_fast
from frozen_fast.config import config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_towers import CLIP_SIZES, Clip
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.from_config import build_dual_encoder

pytest.importorskip("open_clip", reason="needs the extra clip")
CAPTIONS = ["a dog runs", "two cats &amp; a mouse"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Clip]:
    torch.manual_seed(0)
    model = Clip(CLIP_SIZES["tiny"]).eval()
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path, model


def build(path: Path, *, first_frames: int = 4, **video: Any) -> DualEncoder:
    section = {
        "video": {"tower": "clip", "weights": str(path), **video},
        "text": {"tower": "clip", "name": str(path), "max_tokens": 32},
        "embedding_width": 0,
        "text_activation": "none",
    }
    config = config_from_mapping({"model": section}).model
    return build_dual_encoder(config, max_frames=6, first_frames=first_frames).eval()


@pytest.mark.parametrize("over_time", ["mean", "transformer"])
def test_it_starts_as_the_mean_of_normalised_frame_embeddings(over_time: str, clip: tuple[Path, Clip]) -> None:
    path, theirs = clip
    model = build(path, over_time=over_time)
    video = torch.randn(3, 4, 3, 32, 32)
    with torch.no_grad():
        by_hand = []
        for clip_TCHW in video:
            frames = [theirs.visual(frame[None, None])[0, 0] for frame in clip_TCHW]
            by_hand.append(sum(frame / frame.norm() for frame in frames) / 4)
        expected = F.normalize(torch.stack(by_hand), dim=-1)
        assert (model.encode_video(video) - expected).abs().max() < 1e-5
        tokens = model.tokenizer(CAPTIONS)
        text = F.normalize(theirs(tokens["input_ids"]), dim=-1)
        assert (model.encode_text(CAPTIONS) - text).abs().max() < 1e-5
        assert (model.similarity(CAPTIONS, video) - text @ expected.T).abs().max() < 1e-5
    assert not model.txt_proj.state_dict() and not model.vid_proj.state_dict()


def test_the_transformer_learns_and_takes_more_frames_later(clip: tuple[Path, Clip]) -> None:
    model = build(clip[0], over_time="transformer", first_frames=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the inner weights move once the output projections have left 0
        optimizer.zero_grad()
        model.similarity(CAPTIONS, torch.randn(2, 2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still
    with pytest.raises(ValueError, match="up to 2"):
        model.encode_video(torch.randn(1, 4, 3, 32, 32))
    model.expand_frames(4, "bilinear")
    assert model.encode_video(torch.randn(1, 4, 3, 32, 32)).shape == (1, 128)


def test_divided_is_clips_image_tower_at_one_frame(clip: tuple[Path, Clip]) -> None:
    path, theirs = clip
    model = build(path, tower="clip_divided", first_frames=1)
    video = torch.randn(3, 1, 3, 32, 32)
    with torch.no_grad():
        expected = F.normalize(theirs.visual(video)[:, 0], dim=-1)
        assert (model.encode_video(video) - expected).abs().max() < 1e-5
        model.expand_frames(4, "zero")
        still = model.encode_video(video.expand(-1, 4, -1, -1, -1))
        assert still.shape == (3, 128) and model.encode_video(torch.randn(3, 4, 3, 32, 32)).isfinite().all()


def test_divided_learns_time_and_comes_back_from_a_folder(clip: tuple[Path, Clip], tmp_path: Path) -> None:
    model = build(clip[0], tower="clip_divided", first_frames=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    video = torch.randn(2, 4, 3, 32, 32)
    for _ in range(2):  # queries and keys of time attention move once its output has left 0
        optimizer.zero_grad()
        model.similarity(CAPTIONS, video).square().sum().backward()
        optimizer.step()
    for part in ("blocks.0.timeattn.qkv.weight", "blocks.0.timeattn.proj.weight", "temporal_embed", "proj"):
        name = f"video_model.{part}"
        assert (model.state_dict()[name] - before[name]).abs().max() > 0, name
    model.save_pretrained(tmp_path)
    copy = frozen_fast.load_model(tmp_path)
    model.eval()
    with torch.no_grad():
        assert torch.equal(copy.encode_video(video), model.encode_video(video))


@pytest.mark.parametrize("over_time", ["mean", "transformer"])
def test_a_folder_gives_the_model_back(over_time: str, clip: tuple[Path, Clip], tmp_path: Path) -> None:
    model = build(clip[0], over_time=over_time)
    model.save_pretrained(tmp_path)
    copy = frozen_fast.load_model(tmp_path)
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(copy.similarity(CAPTIONS, video), model.similarity(CAPTIONS, video))


def test_mistakes_are_told(clip: tuple[Path, Clip]) -> None:
    with pytest.raises(UserError, match="model.video.size: got 'ViT-B/23' .*did you mean 'ViT-B/32'"):
        build(clip[0], weights="none", size="ViT-B/23")
    with pytest.raises(UserError, match="model.video.size: got 'ViT-B/16'; allowed: null"):
        build(clip[0], size="ViT-B/16")
    with pytest.raises(UserError, match="model.video.block: .*the tower clip does not read it"):
        build(clip[0], block="timesformer")
