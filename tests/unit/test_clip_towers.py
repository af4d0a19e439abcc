"""CLIP's towers against transformers' own, from every form of checkpoint file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from frozen_fast.errors import UserError
from frozen_fast.models.clip.clip_towers import CLIP_SIZES, Clip
from frozen_fast.models.clip.clip_weights import read_clip

END = 99


def transformers_clip(act: str = "quick_gelu") -> CLIPModel:
    """A small CLIPModel whose weights are large enough that an error in any of them shows."""
    shared = {"num_hidden_layers": 3, "hidden_act": act}
    config = CLIPConfig(
        text_config={
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "vocab_size": 100,
            "eos_token_id": END,
            "bos_token_id": 98,
            **shared,
        },
        vision_config={
            "hidden_size": 192,
            "num_attention_heads": 3,
            "intermediate_size": 768,
            "image_size": 48,
            "patch_size": 16,
            **shared,
        },
        projection_dim=64,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def openai_state(model: CLIPModel) -> dict[str, Tensor]:
    """transformers' weights under OpenAI's names, written apart from the code under test."""
    theirs = model.state_dict()
    state = {
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T,
        "logit_scale": theirs["logit_scale"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
        for ours, tower in (("", "text_model"), ("visual.", "vision_model")):
            for layer in range(3):
                old, new = f"{tower}.encoder.layers.{layer}", f"{ours}transformer.resblocks.{layer}"
                attention = [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
                state[f"{new}.attn.in_proj_{kind}"] = torch.cat(attention)
                state[f"{new}.attn.out_proj.{kind}"] = theirs[f"{old}.self_attn.out_proj.{kind}"]
                state[f"{new}.ln_1.{kind}"] = theirs[f"{old}.layer_norm1.{kind}"]
                state[f"{new}.ln_2.{kind}"] = theirs[f"{old}.layer_norm2.{kind}"]
                state[f"{new}.mlp.c_fc.{kind}"] = theirs[f"{old}.mlp.fc1.{kind}"]
                state[f"{new}.mlp.c_proj.{kind}"] = theirs[f"{old}.mlp.fc2.{kind}"]
    return {name: value.clone() for name, value in state.items()}


class Nest(nn.Module):
    """Modules nested as names say, to be scripted: what torch.jit.save writes of OpenAI's model."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if rest:
                groups.setdefault(head, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(head, nn.Parameter(value))
            else:
                self.register_buffer(head, value)
        for head, group in groups.items():
            self.add_module(f"{head}", Nest(group))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save(model: CLIPModel, form: str, folder: Path) -> Path:
    """Write a checkpoint of one form."""
    state = openai_state(model)
    settings = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    path = folder / f"{form}.pt"
    if form == "jit":
        torch.jit.trace(Nest({**state, **settings}), torch.zeros(1)).save(str(path))
    elif form == "state_dict":
        torch.save({**state, **settings}, path)
    elif form == "open_clip":
        text = {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": v for name, v in state.items()}
        torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in text.items()}}, path)
    else:
        model.save_pretrained(folder / "folder")
        return folder / "folder"
    return path


FORMS = ("jit", "state_dict", "open_clip", "transformers")


@pytest.mark.parametrize("form", FORMS)
def test_both_towers_equal_transformers(form: str, tmp_path: Path) -> None:
    theirs = transformers_clip()
    ours = read_clip(save(theirs, form, tmp_path)).build().eval()
    images = torch.randn(2, 3, 3, 48, 48)
    ids = torch.randint(1, 97, (5, 12))
    for row, end in enumerate((2, 5, 11, 7, 3)):
        ids[row, end], ids[row, end + 1 :] = END, 0
    ids[:, 0] = 98
    with torch.no_grad():
        image = theirs.get_image_features(images.flatten(0, 1)).pooler_output
        text = theirs.get_text_features(ids).pooler_output
        assert (ours.visual(images).flatten(0, 1) - image).abs().max() < 1e-5 * image.abs().max()
        assert (ours(ids) - text).abs().max() < 1e-5 * text.abs().max()
        tokens = ours(ids, all_tokens=True)
    assert torch.equal(tokens[torch.arange(5), torch.tensor([2, 5, 11, 7, 3])], ours(ids).detach())
    assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
    assert image.abs().max() > 0.1 and text.abs().max() > 0.1


def test_gelu_comes_from_the_folder_or_the_caller(tmp_path: Path) -> None:
    theirs = transformers_clip("gelu")
    folder = save(theirs, "transformers", tmp_path)
    images = torch.randn(1, 1, 3, 48, 48)
    with torch.no_grad():
        expected = theirs.get_image_features(images[0]).pooler_output
        for source, activation in ((folder, None), (save(theirs, "state_dict", tmp_path), "gelu")):
            assert (read_clip(source, activation).build().visual(images)[0] - expected).abs().max() < 1e-5
        assert (read_clip(folder, "quick_gelu").build().visual(images)[0] - expected).abs().max() > 1e-3


def test_half_precision_files_come_as_fp32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in openai_state(transformers_clip()).items()}
    torch.save(state, tmp_path / "half.pt")
    weights = read_clip(tmp_path / "half.pt")
    assert {value.dtype for value in weights.state.values()} == {torch.float32}
    assert torch.equal(weights.state["visual.proj"], state["visual.proj"].float())


@pytest.mark.parametrize(("name", "count"), [("ViT-B/32", 151_277_313), ("ViT-B/16", 149_620_737)])
def test_the_number_of_parameters_is_clips(name: str, count: int) -> None:
    with torch.device("meta"):
        model = Clip(CLIP_SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == 302


def test_a_single_frame_needs_no_batch_of_its_size() -> None:
    """Frames are embedded one by one: a clip of three equals three clips of one."""
    model = Clip(CLIP_SIZES["tiny"]).eval()
    video = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        whole, single = model.visual(video), model.visual(video.flatten(0, 1)[:, None])
    assert torch.allclose(whole.flatten(0, 1), single[:, 0], atol=1e-5)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain = Clip(CLIP_SIZES["tiny"])
    recomputed = Clip(CLIP_SIZES["tiny"], checkpointed_blocks=1)
    recomputed.load_state_dict(plain.state_dict())
    video = torch.randn(2, 1, 3, 32, 32)
    for model in (plain, recomputed):
        model.visual(video).square().sum().backward()
    for (name, left), right in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert name.startswith("visual") == (left.grad is not None)
        if left.grad is not None and right.grad is not None:
            assert torch.allclose(left.grad, right.grad, atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ln_final.bias"), "lacks ln_final.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda state: state.update({"ln_final.bias": torch.zeros(3)}), "ln_final.bias has shape \\[3\\]"),
        (lambda state: state.pop("visual.conv1.weight"), "no ViT of CLIP"),
        (lambda state: state.update({"visual.positional_embedding": torch.zeros(8, 192)}), "image positions"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(change, message: str, tmp_path: Path) -> None:
    state = openai_state(transformers_clip())
    change(state)
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=message):
        read_clip(tmp_path / "wrong.pt")


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    path = save(transformers_clip(), "jit", tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match="readable torch checkpoint"):
        read_clip(path)
    with pytest.raises(UserError, match="no such file"):
        read_clip(tmp_path / "absent.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="model.safetensors"):
        read_clip(tmp_path / "empty")


def test_reading_an_archive_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.jit.load would rebuild the code; the reader must not come near it."""
    path = save(transformers_clip(), "jit", tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("torch.jit.load was called"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    assert len(read_clip(path).state) == len(openai_state(transformers_clip()))


def test_a_folder_without_a_config_takes_heads_of_64(tmp_path: Path) -> None:
    folder = save(transformers_clip(), "transformers", tmp_path)
    with_config = read_clip(folder)
    assert json.loads((folder / "config.json").read_text())["vision_config"]["num_attention_heads"] == 3
    (folder / "config.json").unlink()
    assert read_clip(folder).size == with_config.size


def test_shapes_are_checked() -> None:
    model = Clip(CLIP_SIZES["tiny"])
    with pytest.raises(ValueError, match=r"allowed: \[B, T, 3, 32, 32\]"):
        model.visual(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="got 78 tokens; allowed: up to 77"):
        model(torch.ones(1, 78, dtype=torch.long))
