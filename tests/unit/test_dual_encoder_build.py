from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from frozen_fast.config.schema import ModelConfig, TextTowerConfig, VideoTowerConfig
from frozen_fast.errors import UserError
from frozen_fast.models import SpaceTimeTransformer, VideoSize, build_dual_encoder, load_vit_weights
from frozen_fast.models.video import vit_weights as vit_module
from support.released import ReleasedModel, write_released_checkpoint
from support.towers import make_text_tower

SIZE = VideoSize(resolution=32, patch=16, width=64, depth=2, heads=2)


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_tower(tmp_path_factory.mktemp("tower"))


def model_config(tower: Path, **video: object) -> ModelConfig:
    return ModelConfig(
        video=VideoTowerConfig(size="pico_patch16_32", **video),
        text=TextTowerConfig(name=str(tower), max_tokens=16),
        embedding_width=32,
    )


def make_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    vit = VisionTransformer(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vit


# From a config ---------------------------------------------------------------------------------------------------


def test_the_config_builds_the_model_and_the_seed_its_weights(tower_folder: Path) -> None:
    config = model_config(tower_folder, block="timesformer", attention="sdpa", checkpointed_blocks=1)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build_dual_encoder(config, max_frames=8, first_frames=1, mean=(0, 0, 0), std=(1, 1, 1)))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = models[0]
    video = model.video_model
    assert (video.max_frames, model.learned_frames, model.embedding_width) == (8, 1, 32)
    assert (video.block, video.attention, video.checkpointed_blocks) == ("timesformer", "sdpa", 1)
    assert (model.mean, model.std) == ((0, 0, 0), (1, 1, 1))
    assert model.text_model.tokenizer is not None and model.text_model.tokenizer.max_tokens == 16


def test_a_checkpoint_starts_the_model_with_room_for_the_curriculum(tower_folder: Path, tmp_path: Path) -> None:
    config = model_config(tower_folder)
    first = build_dual_encoder(config, max_frames=4, first_frames=2, mean=(0.5, 0.5, 0.5))
    with torch.no_grad():
        first.video_model.temporal_embed[:, :2].normal_()
    first.save_pretrained(tmp_path)
    again = replace(config, checkpoint=str(tmp_path), expansion="nearest")
    cases = {(8, 1): ("learned more than the first stage needs", 2), (8, 4): ("learned fewer: expanded", 4)}
    for (max_frames, first_frames), (meaning, learned) in cases.items():
        model = build_dual_encoder(again, max_frames=max_frames, first_frames=first_frames)
        assert model.training
        assert (model.video_model.max_frames, model.learned_frames) == (max_frames, learned), meaning
        assert torch.equal(model.video_model.temporal_embed[:, 0], first.video_model.temporal_embed[:, 0])
        assert model.video_model.temporal_embed[:, learned:].abs().max() == 0
        assert model.mean == (0.5, 0.5, 0.5)
    shorter = build_dual_encoder(again, max_frames=1, first_frames=1)
    assert (shorter.video_model.max_frames, shorter.learned_frames) == (2, 2)


def test_a_released_checkpoint_needs_a_tokenizer_to_train(tower_folder: Path, tmp_path: Path) -> None:
    path = write_released_checkpoint(tmp_path / "x.pth.tar", ReleasedModel())
    config = ModelConfig(checkpoint=str(path), text=TextTowerConfig(max_tokens=16))
    with pytest.raises(UserError, match="model.text.tokenizer: got none"):
        build_dual_encoder(config, max_frames=8, first_frames=4)
    config = replace(config, text=TextTowerConfig(tokenizer=str(tower_folder), max_tokens=16))
    model = build_dual_encoder(config, max_frames=8, first_frames=4)
    assert model.text_model.tokenizer is not None and model.text_model.tokenizer.max_tokens == 16


# ViT weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "wrapped", "safetensors"])
def test_a_tower_started_from_a_vit_computes_the_vit_at_one_frame(tmp_path: Path, form: str) -> None:
    vit = make_vit()
    state = vit.state_dict()
    path = tmp_path / ("vit.safetensors" if form == "safetensors" else "vit.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if form == "wrapped" else state, path)
    tower = SpaceTimeTransformer(SIZE, 4)
    load_vit_weights(tower, str(path))
    frame = torch.randn(2, 3, 32, 32)
    expected = vit.forward_features(frame)[:, 0]
    torch.testing.assert_close(tower(frame[:, None]), expected, rtol=0, atol=1e-5)


def test_time_attention_keeps_its_own_start(tmp_path: Path) -> None:
    torch.save(make_vit().state_dict(), tmp_path / "vit.pth")
    tower = SpaceTimeTransformer(SIZE, 4)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    load_vit_weights(tower, str(tmp_path / "vit.pth"))
    own = {n for n in before if "timeattn" in n or "norm3" in n or n == "temporal_embed"}
    changed = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before) - own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "which lacks blocks.1.attn.proj.bias, blocks.1.attn.proj.weight, .* and 9 more"),
        ({"depth": 3}, "with blocks.2.*allowed: a plain ViT of this size"),
        ({"embed_dim": 32}, r"whose cls_token has shape \[1, 1, 32\]; allowed: \[1, 1, 64\]"),
        ({"img_size": 64}, r"whose pos_embed has shape \[1, 17, 64\]; allowed: \[1, 5, 64\]"),
        ({"init_values": 0.1}, "with blocks.0.ls1.gamma"),
    ],
)
def test_a_vit_of_another_size_is_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    torch.save(make_vit(**options).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=f"model.video.weights: got .*{message}"):
        load_vit_weights(SpaceTimeTransformer(SIZE, 2), str(tmp_path / "vit.pth"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "existing local file"),
        ("text.pth", b"not a checkpoint", "cannot be read"),
        ("text.safetensors", b"not a checkpoint", "cannot be read"),
        ("text.npz", b"not a checkpoint", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"model.video.weights: got .*{message}") as caught:
        load_vit_weights(SpaceTimeTransformer(SIZE, 2), str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="contains no state dict of tensors"):
        load_vit_weights(SpaceTimeTransformer(SIZE, 2), str(tmp_path / "list.pth"))


def test_a_timm_name_is_created_with_its_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = make_vit(num_classes=0)
    asked = []

    def create_model(name: str, **options: object) -> VisionTransformer:
        asked.append((name, options))
        return vit

    monkeypatch.setattr(timm, "create_model", create_model)
    tower = SpaceTimeTransformer(SIZE, 2)
    load_vit_weights(tower, "timm:vit_base_patch16_224")
    assert asked == [("vit_base_patch16_224", {"pretrained": True, "num_classes": 0})]
    assert torch.equal(tower.state_dict()["blocks.1.mlp.fc2.weight"], vit.state_dict()["blocks.1.mlp.fc2.weight"])


def test_timm_names_that_do_not_exist_or_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no network here\nand a second line")

    tower = SpaceTimeTransformer(SIZE, 2)
    with pytest.raises(UserError, match="model.video.weights: got 'timm:no_such_vit'; allowed: a timm model such as"):
        load_vit_weights(tower, "timm:no_such_vit")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match="'timm:vit_base_patch16_224', which could not be loaded") as caught:
        load_vit_weights(tower, "timm:vit_base_patch16_224")
    assert "\n" not in str(caught.value)


def test_the_original_npz_form_goes_through_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own converter reads the file; here it is replaced, and what must hold is what we hand it and take."""
    vit = make_vit(num_classes=0)
    paths = []

    def load_pretrained(self: VisionTransformer, path: str) -> None:
        paths.append(path)
        self.load_state_dict(vit.state_dict())

    monkeypatch.setattr(VisionTransformer, "load_pretrained", load_pretrained)
    (tmp_path / "vit.npz").write_bytes(b"x")
    tower = SpaceTimeTransformer(SIZE, 2)
    load_vit_weights(tower, str(tmp_path / "vit.npz"))
    assert paths == [str(tmp_path / "vit.npz")]
    assert torch.equal(tower.state_dict()["pos_embed"], vit.state_dict()["pos_embed"])


def test_the_weights_key_of_the_config_is_used(tower_folder: Path, tmp_path: Path) -> None:
    torch.save(make_vit().state_dict(), tmp_path / "vit.pth")
    config = model_config(tower_folder, weights=str(tmp_path / "vit.pth"))
    model = build_dual_encoder(config, max_frames=2, first_frames=2)
    assert torch.equal(model.video_model.pos_embed, make_vit().pos_embed)
    assert vit_module.FIELD == "model.video.weights"
