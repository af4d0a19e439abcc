"""CLIP2Video against a plain rewrite of its equations, from released files, with whole and short clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import frozen_fast
from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_towers import CLIP_SIZES
from frozen_fast.models.clip.clip_weights import ClipWeights
from frozen_fast.models.clip2video.clip2video_model import Clip2Video
from support.plain_clip2video import plain_similarity

QUERIES, CLIPS = 3, 5


def released_state(centers: int = 5, name: str = "tiny") -> dict[str, Tensor]:
    """Random weights in the released form, large enough that every part moves the scores."""
    torch.manual_seed(0)
    model = Clip2Video(CLIP_SIZES[name], centers=centers)
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("ln_1.weight") or "ln_2.weight" in key or key.endswith("norm.weight"):
            state[key] = 1 + 0.1 * torch.randn_like(value)
        elif key == "clip.logit_scale":
            state[key] = torch.tensor(4.6052)
        else:
            state[key] = value + 0.1 * torch.randn_like(value)
    return state


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "pytorch_model.bin.2"
    torch.save(released_state(), path)
    return path


def inputs(frames: int, lengths: list[int] | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.zeros(QUERIES, 32, dtype=torch.long)
    for row, length in enumerate((4, 32, 11)):
        ids[row, :length] = torch.randint(1, 40000, (length,))
        ids[row, 0], ids[row, length - 1] = 49406, 49407
    video = torch.randn(CLIPS, frames, 3, 32, 32)
    mask = torch.ones(CLIPS, frames, dtype=torch.long)
    for row, length in enumerate(lengths or []):
        video[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, video, mask


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize(
    ("frames", "lengths"),
    [(12, None), (12, [12, 7, 3, 5, 11]), (6, [6, 4, 3, 5, 6]), (5, [5, 5, 3, 4, 5])],
    ids=["whole", "short", "six frames", "odd"],
)
def test_both_similarities_equal_the_equations(
    frames: int, lengths: list[int] | None, compatible: bool, released: Path
) -> None:
    text, video, mask = inputs(frames, lengths)
    model = frozen_fast.load_model(released, kind="clip2video", compatible_masks=compatible)
    state = torch.load(released, weights_only=True)
    with torch.no_grad():
        expected = plain_similarity(state, *text.values(), video, mask, compatible=compatible)
        got = model.pair_similarities(model.text_features(text), model.video_features(video, mask))
        assert (got - expected).abs().max() < 1e-4
        similarity = model.similarity(text, video, frame_mask=mask)
        assert (similarity - expected.mean(0)).abs().max() < 1e-4 and similarity.dtype == torch.float32
        if lengths is None:
            assert (model.similarity(text, video) - similarity).abs().max() < 1e-4
    assert expected.std() > 0.5, "the scores say something"


def test_the_tiling_mistake_moves_scores_only_where_lengths_differ(released: Path) -> None:
    right = frozen_fast.load_model(released, kind="clip2video")
    wrong = frozen_fast.load_model(released, kind="clip2video", compatible_masks=True)
    for lengths, moved in (([12, 7, 3, 5, 11], True), ([7] * CLIPS, False)):
        text, video, mask = inputs(12, lengths)
        with torch.no_grad():
            scores = [model.similarity(text, video, frame_mask=mask) for model in (right, wrong)]
        assert ((scores[0] - scores[1]).abs().max() > 1e-2) == moved


def test_a_clip_scores_the_same_in_any_batch_when_masks_are_right(released: Path) -> None:
    text, video, mask = inputs(12, [12, 7, 3, 5, 11])
    model = frozen_fast.load_model(released, kind="clip2video")
    with torch.no_grad():
        whole = model.similarity(text, video, frame_mask=mask)
        alone = [model.similarity(text, video[i : i + 1], frame_mask=mask[i : i + 1]) for i in range(CLIPS)]
    assert (whole - torch.cat(alone, dim=1)).abs().max() < 1e-4


@pytest.mark.parametrize("valid", [1, 2])
def test_fewer_than_three_valid_frames(valid: int, released: Path) -> None:
    """Both valid frames leave no valid difference in TAB: all its keys are masked, which is no mask at all."""
    text, video, mask = inputs(12, [valid, 12, valid, 12, 12])
    model = frozen_fast.load_model(released, kind="clip2video")
    state = torch.load(released, weights_only=True)
    with torch.no_grad():
        expected = plain_similarity(state, *text.values(), video, mask, compatible=False).mean(0)
        assert (model.similarity(text, video, frame_mask=mask) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("centers", "count"), [(5, 170_238_209), (7, 170_240_257)])
def test_the_number_of_parameters_is_the_released_one(centers: int, count: int) -> None:
    with torch.device("meta"):
        model = Clip2Video(CLIP_SIZES["ViT-B/32"], centers=centers)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == 380


def test_the_start_from_clip() -> None:
    size = CLIP_SIZES["tiny"]
    torch.manual_seed(0)
    model = Clip2Video(size, centers=7)
    clip = {name: torch.randn_like(value) for name, value in model.clip.state_dict().items()}
    model.start_from_clip(ClipWeights(clip, size))
    state = model.state_dict()
    assert torch.equal(state["frame_position_embeddings.weight"], clip["positional_embedding"])
    assert torch.equal(state["type_position_embeddings.weight"], clip["positional_embedding"][:2])
    for temporal, depth in (("transformerClip", 4), ("frame2t_attention", 1), ("actionClip", 1)):
        names = [name for name in clip if name.startswith("transformer.resblocks.") and int(name.split(".")[2]) < depth]
        assert len(names) == 12 * depth
        for name in names:
            assert torch.equal(state[name.replace("transformer", temporal, 1)], clip[name])
    centers = torch.stack([state["weight_center"], state["emb_center"]])
    assert centers.shape == (2, 7, 128) and abs(centers.std().item() - 0.125) < 0.01
    assert torch.equal(state["trans_layernorm.weight"], torch.ones(128))


def test_uint8_clips_are_normalised_and_padding_is_zero(released: Path) -> None:
    model = frozen_fast.load_model(released, kind="clip2video")
    pixels = torch.randint(0, 256, (2, 6, 3, 32, 32), dtype=torch.uint8)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    floats = (pixels.float() / 255 - mean) / std * mask[:, :, None, None, None]
    text, _, _ = inputs(6, None)
    with torch.no_grad():
        by_hand = model.similarity(text, floats, frame_mask=mask)
        assert (model.similarity(text, pixels, frame_mask=mask) - by_hand).abs().max() < 1e-3
        as_dict = model.similarity(text, {"video": floats, "frame_mask": mask})
    assert torch.equal(as_dict, by_hand)


def test_folders_and_released_files_load_alike(released: Path, tmp_path: Path) -> None:
    model = frozen_fast.load_model(released, kind="clip2video", compatible_masks=True)
    model.save_pretrained(tmp_path)
    copy = frozen_fast.load_model(tmp_path)
    assert isinstance(copy, Clip2Video) and copy.compatible_masks and not copy.training
    text, video, mask = inputs(12, [12, 7, 3, 5, 11])
    with torch.no_grad():
        assert torch.equal(
            model.similarity(text, video, frame_mask=mask), copy.similarity(text, video, frame_mask=mask)
        )
    assert frozen_fast.load_model(tmp_path, compatible_masks=False).compatible_masks is False


def test_strings_are_tokenised_as_the_released_code_does(released: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra clip")
    model = frozen_fast.load_model(released, kind="clip2video")
    assert model.tokenizer is not None
    tokens = model.tokenizer(["a dog runs", "word " * 60])
    assert tokens["input_ids"].shape == (2, 32) and tokens["input_ids"][1, -1] == 49407
    with torch.no_grad():
        by_ids, by_text = model.text_features(tokens), model.text_features(["a dog runs", "word " * 60])
    assert all(torch.equal(by_ids[name], by_text[name]) for name in by_ids)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_half_precision_and_parallel_names(prefix: str, tmp_path: Path) -> None:
    state = released_state(7)
    half = {
        f"{prefix}{name}": value.half() if name.startswith("clip.") and value.dim() > 1 else value
        for name, value in state.items()
    }
    torch.save(half, tmp_path / "pytorch_model.bin.22")
    model = frozen_fast.load_model(tmp_path / "pytorch_model.bin.22", kind="clip2video", centers=7)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.clip.visual.proj, half[f"{prefix}clip.visual.proj"].float())
    assert model.centers == 7


def test_mistakes_are_told_in_one_line(released: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="centers: got 7 .* allowed: 5"):
        frozen_fast.load_model(released, kind="clip2video", centers=7)
    with pytest.raises(UserError, match="kind: got none"):
        frozen_fast.load_model(released)
    with pytest.raises(UserError, match="kind: got 'clip3video'.*did you mean 'clip2video'"):
        frozen_fast.load_model(released, kind="clip3video")
    state = released_state()
    state.pop("trans_layernorm.bias")
    torch.save(state, tmp_path / "wrong.bin")
    with pytest.raises(UserError, match="lacks trans_layernorm.bias"):
        frozen_fast.load_model(tmp_path / "wrong.bin", kind="clip2video")
    model = frozen_fast.load_model(released, kind="clip2video")
    text, video, mask = inputs(12, None)
    with pytest.raises(ValueError, match=r"frame_mask: got shape \[5, 11\]; allowed: \[5, 12\]"):
        model.similarity(text, video, frame_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="T up to 77"):
        model.similarity(text, video[0])
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        model.similarity({"input_ids": text["input_ids"]}, video)


def test_flops_are_those_of_its_parts() -> None:
    """CLIP per frame and per token, the temporal blocks by hand from their sizes; freezing CLIP leaves theirs."""
    with torch.device("meta"):
        model = Clip2Video(CLIP_SIZES["ViT-B/32"])
    found = model.side_flops(12, 32)
    assert found is not None
    layer = 2 * 12 * 512**2  # per token: qkv, projection, MLP
    temporal = layer * (4 * 23 + 11 + 5 + 11)  # transformerClip, differences of 12 and of 6 frames, actionClip
    blocks = 11 * 12 + 2  # widths squared per token; the last block computes keys and values of all, the rest of CLS
    image = 12 * 2 * (49 * 3 * 32 * 32 * 768 + 50 * blocks * 768**2)
    assert found.video == pytest.approx(image + temporal, rel=0.03)
    assert found.text == pytest.approx(32 * (12 * layer + 2 * 512 * 512), rel=0.03)
    assert found.frozen == 0
    model.clip.visual.requires_grad_(False)
    frozen = model.side_flops(12, 32)
    assert frozen is not None and frozen.frozen == pytest.approx(image, rel=0.03)


def test_training_mode_gives_every_parameter_a_gradient(released: Path) -> None:
    """And the ceiling of the logit scale lets it learn below, as CLIP's clamp after each step does."""
    model = frozen_fast.load_model(released, kind="clip2video").train()
    text, video, mask = inputs(12, [12, 7, 3, 5, 11])
    model.pair_similarities(model.text_features(text), model.video_features(video, mask)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
