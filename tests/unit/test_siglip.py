"""SigLIP's towers against transformers' own, in the dual encoder, and with its sigmoid loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

import frozen_fast
from frozen_fast.config import config_from_mapping
from frozen_fast.errors import UserError
from frozen_fast.losses.gathered import gathered_loss
from frozen_fast.losses.sigmoid import SigmoidLoss
from frozen_fast.models.clip.clip_weights import read_clip
from frozen_fast.models.clip.siglip_towers import SIGLIP_SIZES, SiglipImageTower, SiglipTextTower
from frozen_fast.models.clip.siglip_weights import load_side, read_siglip
from frozen_fast.models.dual_encoder import DualEncoder
from frozen_fast.models.from_config import build_dual_encoder
from frozen_fast.models.learned_scale import LearnedScale

CAPTIONS = ["a dog runs", "two cats"]
WORDS = ["</s>", "<pad>", "a", "dog", "runs", "two", "cats", "<unk>"]


def transformers_siglip() -> SiglipModel:
    """A small SiglipModel whose weights are large enough that an error in any of them shows."""
    both = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**both, "vocab_size": 100, "max_position_embeddings": 16},
        vision_config={**both, "image_size": 52, "patch_size": 16},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a word tokenizer that ends captions with </s>."""
    path = tmp_path_factory.mktemp("siglip")
    transformers_siglip().save_pretrained(path)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}', encoding="utf-8")
    return path


def build(path: Path, **video: Any) -> DualEncoder:
    section = {
        "video": {"tower": "siglip", "weights": str(path), **video},
        "text": {"tower": "siglip", "name": str(path)},
        "embedding_width": 0,
        "text_activation": "none",
    }
    return build_dual_encoder(config_from_mapping({"model": section}).model, max_frames=6, first_frames=4).eval()


def test_both_towers_equal_transformers(folder: Path) -> None:
    theirs, weights = transformers_siglip(), read_siglip(folder)
    image, text = SiglipImageTower(weights.size).eval(), SiglipTextTower(weights.size).eval()
    load_side(image, weights, "visual.")
    load_side(text, weights, "")
    video = torch.randn(2, 3, 3, 52, 52)
    ids = torch.randint(2, 100, (5, 11))
    padded = F.pad(ids, (0, 5), value=theirs.config.text_config.pad_token_id)
    with torch.no_grad():
        frames = theirs.get_image_features(video.flatten(0, 1)).pooler_output
        captions = theirs.get_text_features(padded).pooler_output
        assert (image(video).flatten(0, 1) - frames).abs().max() < 1e-5 * frames.abs().max()
        assert (text(ids) - captions).abs().max() < 1e-5 * captions.abs().max()
    assert frames.abs().max() > 0.1 and captions.abs().max() > 0.1
    assert weights.logit_scale == pytest.approx(theirs.logit_scale.item())
    assert weights.logit_bias == pytest.approx(theirs.logit_bias.item())


@pytest.mark.parametrize("over_time", ["mean", "transformer"])
def test_the_dual_encoder_is_the_mean_over_frames_and_comes_back_from_a_folder(
    over_time: str, folder: Path, tmp_path: Path
) -> None:
    theirs, model = transformers_siglip(), build(folder, over_time=over_time)
    video = torch.randn(3, 4, 3, 52, 52)
    ids = torch.tensor([[2, 3, 4, 0], [5, 6, 0, 1]])
    with torch.no_grad():
        frames = theirs.get_image_features(video.flatten(0, 1)).pooler_output
        mean = F.normalize(F.normalize(frames, dim=-1).unflatten(0, (3, 4)).mean(1), dim=-1)
        text = F.normalize(theirs.get_text_features(F.pad(ids, (0, 12), value=1)).pooler_output, dim=-1)
        assert (model.similarity(CAPTIONS, video) - text @ mean.T).abs().max() < 1e-5
        model.save_pretrained(tmp_path)
        copy = frozen_fast.load_model(tmp_path)
        assert torch.equal(copy.similarity(CAPTIONS, video), model.similarity(CAPTIONS, video))


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        towers = [SiglipImageTower(SIGLIP_SIZES["base-patch16-224"]), SiglipTextTower(SIGLIP_SIZES["base-patch16-224"])]
        theirs = SiglipModel(SiglipConfig())
    counts = [sum(parameter.numel() for parameter in tower.parameters()) for tower in towers]
    assert sum(counts) + 2 == sum(parameter.numel() for parameter in theirs.parameters()) == 203_155_970


def test_the_scale_and_the_bias_of_its_loss_are_learned(folder: Path) -> None:
    """Equation 1 of the paper: -log sigmoid of +-(scale * similarity + bias), summed over pairs, per clip."""
    model = build(folder).train()
    model.loss_scale = LearnedScale(10.0, max_scale=200.0, bias=-10.0)
    text, video, parameters = model(torch.randn(2, 4, 3, 52, 52), model.tokenizer(CAPTIONS))
    sim = model.pair_similarities(text, video)[0]
    signs = 2 * torch.eye(2) - 1
    expected = -F.logsigmoid(signs * (10.0 * sim - 10.0)).sum() / 2
    total, value = gathered_loss(model.pair_similarities, SigmoidLoss(1.0, 0.0), text, video, parameters)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-4)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains a SigLIP, whose ViT has no CLS token; allowed: a CLIP"):
        read_clip(folder)
    with pytest.raises(UserError, match="contains a SigLIP, whose ViT has no CLS token"):
        build(folder, tower="clip_divided")
    with pytest.raises(UserError, match="model.video.size: got 'base-patch16-225' .*did you mean 'base-patch16-224'"):
        build(folder, weights="none", size="base-patch16-225")
    with pytest.raises(UserError, match="allowed: a transformers folder of a SigLIP"):
        read_siglip(tmp_path / "absent")
    with pytest.raises(ValueError, match="got 17 tokens; allowed: up to 16"):
        build(folder).text_model(torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17))
