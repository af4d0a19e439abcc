import copy
import json
from pathlib import Path

import pytest
import torch

import frozen_fast
from frozen_fast import DualEncoder
from frozen_fast.errors import UserError
from frozen_fast.models import SpaceTimeTransformer, TransformersTower, VideoSize
from frozen_fast.models.text.transformers_tower import model_from_config
from support.released import ReleasedModel
from support.towers import make_text_tower

SIZE = VideoSize(resolution=32, patch=16, width=128, depth=2, heads=2)
CAPTIONS = ["a small red circle moves", "", "two dogs"]


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_tower(tmp_path_factory.mktemp("tower"))


def make_model(
    folder: Path, *, max_frames: int = 4, learned_frames: int | None = None, **options: object
) -> DualEncoder:
    torch.manual_seed(0)
    video = SpaceTimeTransformer(SIZE, max_frames)
    with torch.no_grad():
        video.temporal_embed.normal_()
        if learned_frames is not None:
            video.temporal_embed[:, learned_frames:] = 0
    text = TransformersTower.build(str(folder), max_tokens=16)
    return DualEncoder(video, text, learned_frames=learned_frames, **options).eval()


def test_the_package_offers_the_model_and_its_version() -> None:
    assert frozen_fast.DualEncoder is DualEncoder
    assert frozen_fast.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        frozen_fast.Nothing  # noqa: B018


def test_embeddings_are_unit_rows_and_raw_on_request(tower_folder: Path) -> None:
    model = make_model(tower_folder)
    video = torch.randn(3, 2, 3, 32, 32)
    for encode, inputs in ((model.encode_video, video), (model.encode_text, CAPTIONS)):
        unit, raw = encode(inputs), encode(inputs, normalize=False)
        assert unit.shape == raw.shape == (3, 256)
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(unit, raw / raw.norm(dim=-1, keepdim=True))
    text, clips, parameters = model(video, model.text_model.tokenize(CAPTIONS))
    forward_text, forward_video = text["embedding"], clips["embedding"]
    assert parameters == {}
    assert torch.equal(forward_video, model.encode_video(video, normalize=False))
    assert torch.equal(forward_text, model.encode_text(CAPTIONS, normalize=False))


def test_strings_and_their_tokens_give_the_same(tower_folder: Path) -> None:
    model = make_model(tower_folder)
    tokens = {**model.text_model.tokenize(CAPTIONS), "token_type_ids": torch.zeros(3, 6)}
    assert torch.equal(model.encode_text(CAPTIONS), model.encode_text(tokens))


def test_padding_does_not_change_a_caption(tower_folder: Path) -> None:
    model = make_model(tower_folder)
    together = model.encode_text(CAPTIONS)
    alone = torch.cat([model.encode_text([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_uint8_pixels_are_normalised_with_the_models_statistics(tower_folder: Path) -> None:
    model = make_model(tower_folder, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = model.encode_video((pixels.float() / 255 - mean) / std)
    torch.testing.assert_close(model.encode_video(pixels), expected, rtol=0, atol=1e-6)
    floats = pixels.float() / 255
    assert torch.equal(model.encode_video(floats.double()), model.encode_video(floats))


def test_raw_float_pixels_are_refused(tower_folder: Path) -> None:
    pixels = torch.randint(0, 256, (1, 2, 3, 32, 32)).float()
    with pytest.raises(ValueError, match="video: got floats up to 255; allowed: floats normalised .*, or uint8 pixels"):
        make_model(tower_folder).encode_video(pixels)


def test_both_encoders_are_differentiable_and_follow_the_mode(tower_folder: Path) -> None:
    model = make_model(tower_folder).train()
    assert not torch.equal(model.encode_text(CAPTIONS), model.encode_text(CAPTIONS)), "dropout is on"
    (model.encode_video(torch.randn(3, 4, 3, 32, 32)) * model.encode_text(CAPTIONS)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    assert torch.equal(model.encode_text(CAPTIONS), model.encode_text(CAPTIONS))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_the_activation_before_the_text_projection(tower_folder: Path, activation: str) -> None:
    model = make_model(tower_folder, text_activation=activation)
    tokens = model.text_model.tokenize(CAPTIONS)
    pooled = model.text_model(tokens["input_ids"], tokens["attention_mask"])
    pooled = pooled.relu() if activation == "relu" else pooled
    projection = model.txt_proj[1]
    torch.testing.assert_close(
        model.encode_text(tokens, normalize=False), pooled @ projection.weight.T + projection.bias, rtol=0, atol=1e-6
    )


def test_frames_beyond_the_learned_ones_need_an_expansion(tower_folder: Path) -> None:
    model = make_model(tower_folder, max_frames=8, learned_frames=2)
    video = torch.randn(1, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"video: got 4 frames; allowed: up to 2.*expand_frames"):
        model.encode_video(video)
    before = model.video_model.temporal_embed.detach().clone()
    model.expand_frames(4, "nearest")
    after = model.video_model.temporal_embed.detach()
    assert model.learned_frames == 4
    assert torch.equal(after[:, :4], before[:, [0, 0, 1, 1]])
    assert after.shape == before.shape and after[:, 4:].abs().max() == 0
    assert model.encode_video(video).isfinite().all()
    model.expand_frames(2)
    assert model.learned_frames == 4 and torch.equal(model.video_model.temporal_embed, after)
    with pytest.raises(UserError, match="num_frames: got 9; allowed: 1 to 8"):
        model.expand_frames(9)


def test_zero_expansion_keeps_shorter_clips_as_they_were(tower_folder: Path) -> None:
    model = make_model(tower_folder, max_frames=8, learned_frames=2)
    video = torch.randn(1, 2, 3, 32, 32)
    before = model.encode_video(video)
    model.expand_frames(8, "zero")
    assert torch.equal(model.encode_video(video), before)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 1, 3, 32, 16), r"video: got shape \[1, 1, 3, 32, 16\]; allowed: \[B, T, 3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32), "video: got shape"),
        (torch.zeros(0, 1, 3, 32, 32), "video: got shape"),
        (torch.zeros(1, 1, 3, 32, 32, dtype=torch.int64), "video: got dtype torch.int64"),
        ([[1.0]], "video: got list"),
    ],
)
def test_clips_of_another_form_are_refused(tower_folder: Path, video: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tower_folder).encode_video(video)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a bare string", "captions: got str"),
        ([], "captions: got none"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, "text: got no tensor 'attention_mask'"),
        ({"input_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)}, "text: got input_ids"),
        (
            {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
            r"attention_mask \[1, 3\]",
        ),
        (
            {"input_ids": torch.zeros(1, 65, dtype=torch.long), "attention_mask": torch.ones(1, 65)},
            "text: got 65 tokens; allowed: up to 64",
        ),
    ],
)
def test_captions_of_another_form_are_refused(tower_folder: Path, texts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tower_folder).encode_text(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_width": 0}, "model.embedding_width: got 0"),
        ({"text_activation": "gelu"}, "model.text_activation: got 'gelu'"),
        ({"learned_frames": 5}, "learned_frames: got 5; allowed: 1 to 4"),
        ({"std": (1, 0, 1)}, "mean, std: got"),
    ],
)
def test_mistakes_are_named(tower_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model(tower_folder, **options)


# Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_a_saved_model_comes_back_without_a_hub(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"embedding_width": 64, "text_activation": "none", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    model = make_model(make_text_tower(tmp_path / "tower", kind), **options)
    model.save_pretrained(tmp_path / "saved")
    for name in ("AutoModel", "AutoTokenizer"):
        target = f"frozen_fast.models.text.transformers_tower.{name}.from_pretrained"
        monkeypatch.setattr(target, lambda *_a, **_k: pytest.fail("hub"))
    loaded = DualEncoder.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    pixels = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded.encode_video(pixels), model.encode_video(pixels))
    assert torch.equal(loaded.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    assert loaded.text_model.tokenizer.max_tokens == 16


@pytest.mark.parametrize("method", ["zero", "nearest", "bilinear"])
def test_rows_drawn_apart_make_the_first_expansions_frames_differ(tower_folder: Path, method: str) -> None:
    torch.manual_seed(0)
    tower = SpaceTimeTransformer(SIZE, 4, temporal_init_std=1.0)
    model = DualEncoder(tower, TransformersTower.build(str(tower_folder), max_tokens=8), learned_frames=1)
    before = tower.temporal_embed.detach().clone()
    model.expand_frames(2, method)
    made = torch.zeros_like(before[:, 0]) if method == "zero" else before[:, 0]
    assert torch.equal(tower.temporal_embed[:, 0], before[:, 0])
    torch.testing.assert_close(tower.temporal_embed[:, 1], made + before[:, 1])
    two = tower.temporal_embed[:, :2].detach().clone()
    model.expand_frames(4, "zero")
    assert torch.equal(tower.temporal_embed[:, :2], two)
    assert torch.equal(tower.temporal_embed[:, 2:], torch.zeros_like(two)), "later expansions are the paper's"


@pytest.mark.parametrize("block", ["frozen_in_time", "timesformer"])
def test_the_block_form_is_kept(tower_folder: Path, tmp_path: Path, block: str) -> None:
    text = TransformersTower.build(str(tower_folder), max_tokens=16)
    model = DualEncoder(SpaceTimeTransformer(SIZE, 2, block=block, time_init="random"), text).eval()
    model.save_pretrained(tmp_path)
    video = torch.randn(1, 2, 3, 32, 32)
    assert torch.equal(DualEncoder.from_pretrained(tmp_path).encode_video(video), model.encode_video(video))


def test_rows_that_were_not_learned_are_not_loaded(tower_folder: Path, tmp_path: Path) -> None:
    make_model(tower_folder, max_frames=8, learned_frames=2).save_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert loaded.learned_frames == loaded.video_model.max_frames == 2
    longer = DualEncoder.from_pretrained(str(tmp_path), num_frames=4, expansion="nearest")
    rows = loaded.video_model.temporal_embed
    assert torch.equal(longer.video_model.temporal_embed, rows[:, [0, 0, 1, 1]])
    assert DualEncoder.from_pretrained(tmp_path, num_frames=1).video_model.temporal_embed.shape[1] == 1
    with pytest.raises(UserError, match="num_frames: got 0"):
        DualEncoder.from_pretrained(tmp_path, num_frames=0)
    with pytest.raises(UserError, match="expansion: got 'linear'"):
        DualEncoder.from_pretrained(tmp_path, num_frames=4, expansion="linear")


def test_another_tokenizer_may_be_given(tower_folder: Path, tmp_path: Path) -> None:
    make_model(tower_folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert DualEncoder.from_pretrained(tmp_path).text_model.tokenizer is None
    loaded = DualEncoder.from_pretrained(tmp_path, tokenizer=str(tower_folder))
    assert torch.equal(loaded.encode_text(CAPTIONS), make_model(tower_folder).encode_text(CAPTIONS))


def test_weights_gathered_elsewhere_are_written_instead(tower_folder: Path, tmp_path: Path) -> None:
    model = make_model(tower_folder)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state=state)
    loaded = DualEncoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_loading_twice_gives_the_same(tower_folder: Path, tmp_path: Path) -> None:
    make_model(tower_folder).save_pretrained(tmp_path)
    first, second = (DualEncoder.from_pretrained(tmp_path).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "whose config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "whose config.json cannot be read"),
        (lambda folder: edit_config(folder, format="other"), "allowed: a folder that frozen_fast wrote"),
        (lambda folder: edit_config(folder, format_version=99), "format version 99; allowed: 1"),
        (lambda folder: edit_config(folder, video=None), "which is incomplete"),
        (lambda folder: edit_config(folder, learned_frames=9), "9 learned frames"),
        (lambda folder: edit_config(folder, embedding_width=8), r"txt_proj.1.weight has shape|vid_proj.0.weight has"),
        (lambda folder: (folder / "model.safetensors").unlink(), "whose model.safetensors cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "whose model.safetensors cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "which is not a tokenizer file"),
    ],
)
def test_a_damaged_folder_is_named(tower_folder: Path, tmp_path: Path, damage: object, message: str) -> None:
    make_model(tower_folder).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        DualEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


# Against the plain rewrite of the released model -----------------------------------------------------------------


def test_the_loss_curve_equals_the_released_models() -> None:
    """Same weights, batches and AdamW: twenty steps of the contrastive loss, fp32, T = 2 then 4."""
    torch.manual_seed(1)
    plain = ReleasedModel(max_frames=4).train()
    text_config = copy.deepcopy(plain.text_model.config)
    ours = DualEncoder(SpaceTimeTransformer(SIZE, 4), TransformersTower(model_from_config(text_config), None, "cls"))
    ours.load_state_dict(plain.state_dict())
    ours.train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-4, eps=1e-6, weight_decay=0) for model in (plain, ours)]
    curves: list[list[float]] = [[], []]
    for step in range(20):
        video = torch.randn(4, 2 if step < 10 else 4, 3, 32, 32)
        ids = torch.randint(5, 140, (4, 7))
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for model, optimizer, curve in zip((plain, ours), optimizers, curves, strict=True):
            raw = model(video, text)
            if model is ours:
                raw = raw[1]["embedding"], raw[0]["embedding"]
            video_BD, text_BD = (torch.nn.functional.normalize(rows, dim=-1) for rows in raw)
            logits = video_BD @ text_BD.T / 0.05
            target = torch.arange(4)
            loss = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(
                logits.T, target
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    assert max(curves[0]) - min(curves[0]) > 0.5, "the curve moves"
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
