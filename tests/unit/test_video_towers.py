"""Video towers beside the space-time transformer: what they take, how they grow, what a checkpoint keeps of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks import parameter_counts
from frozen_fast.cli.main import main
from frozen_fast.config import config_from_mapping, load_config
from frozen_fast.config.schema import ModelConfig, TextTowerConfig, VideoTowerConfig
from frozen_fast.errors import UserError
from frozen_fast.models import DualEncoder, VideoTower, build_dual_encoder, check_model
from frozen_fast.models.video.timm_frames import TimmFrames
from frozen_fast.models.video.torchvision_video import TorchvisionVideo
from frozen_fast.parallel.running_statistics import average_running_statistics
from support.towers import make_text_tower

SIDE = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextTowerConfig:
    return TextTowerConfig(name=str(make_text_tower(tmp_path_factory.mktemp("tower"))), max_tokens=16)


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def sections() -> dict[str, VideoTowerConfig]:
    return {
        "resnet": VideoTowerConfig(tower="timm", size="resnet10t", resolution=SIDE),
        "vit": VideoTowerConfig(
            tower="timm", size="vit_tiny_patch16_224", resolution=SIDE, over_time="transformer", time_layers=1
        ),
        "mc3": VideoTowerConfig(tower="torchvision_video", size="mc3_18", resolution=SIDE),
    }


@pytest.mark.parametrize("name", ["resnet", "vit", "mc3"])
def test_a_model_of_any_tower_grows_learns_and_comes_back(name: str, text: TextTowerConfig, tmp_path: Path) -> None:
    config = ModelConfig(video=sections()[name], text=text, embedding_width=16)
    model = build_dual_encoder(config, max_frames=4, first_frames=1)
    (model.encode_video(clip(1)) * model.encode_text(["a dog", "a cat"])).sum().backward()
    model.expand_frames(4, "nearest")
    (model.encode_video(clip(4)) * model.encode_text(["a dog", "a cat"])).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    assert (model.frame_embeddings() == ["video_model.temporal_embed"]) == (name == "vit")
    model.eval().save_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert loaded.learned_frames == 4 and loaded.video_model.architecture() == model.video_model.architecture()
    assert torch.equal(loaded.encode_video(clip(4)), model.encode_video(clip(4)))
    started = build_dual_encoder(
        ModelConfig(checkpoint=str(tmp_path), text=replace(text, name=None)), max_frames=8, first_frames=4
    )
    started.expand_frames(8, "bilinear")
    assert started.encode_video(clip(8)).shape == (2, 16)


def test_the_mean_over_frames_is_timms_features(text: TextTowerConfig) -> None:
    tower = TimmFrames("resnet10t", resolution=SIDE).eval()
    image_model = timm.create_model("resnet10t", num_classes=0).eval()
    image_model.load_state_dict(tower.image_model.state_dict())
    video = clip(3)
    expected = torch.stack([image_model(video[:, index]) for index in range(3)]).mean(0)
    torch.testing.assert_close(tower(video), expected, rtol=1e-5, atol=1e-5)


def test_a_transformer_over_time_starts_as_the_mean_and_then_tells_orders_apart() -> None:
    torch.manual_seed(0)
    tower = TimmFrames("resnet10t", resolution=SIDE, over_time="transformer", max_frames=3).eval()
    mean = TimmFrames("resnet10t", resolution=SIDE).eval()
    mean.image_model.load_state_dict(tower.image_model.state_dict())
    video, backwards = clip(3), clip(3).flip(1)
    torch.testing.assert_close(tower(video), mean(video), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in (*tower.time_blocks.parameters(), tower.temporal_embed):
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert (tower(video) - tower(backwards)).abs().max() > 1e-2
    torch.testing.assert_close(mean(video), mean(backwards), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "frames", "message"),
    [
        ({"tower": "timm"}, 1, "model.video.size: got none; allowed with the tower timm: a timm model"),
        ({"tower": "timm", "size": "resnet1O1"}, 1, "model.video.size: got 'resnet1O1'; allowed: a timm model such as"),
        ({"tower": "timm", "size": "resnet10t", "block": "timesformer"}, 1, "model.video.block: got 'timesformer'"),
        ({"tower": "timm", "size": "resnet10t", "time_layers": 3}, 1, "model.video.time_layers: got 3 with over_time"),
        ({"tower": "torchvision_video", "size": "r4d"}, 1, "model.video.size: got 'r4d'.*allowed: mc3_18"),
        ({"tower": "torchvision_video", "size": "s3d"}, 4, "frames: got 4; allowed: 8 or more"),
        ({"tower": "torchvision_video", "size": "mvit_v2_s"}, 8, "frames: got 8; allowed: exactly 16"),
        (
            {"tower": "torchvision_video", "size": "mvit_v1_b", "resolution": 112},
            16,
            "model.video.resolution: got 112; allowed: 224",
        ),
        ({"checkpointed_blocks": 13}, 1, "model.video.checkpointed_blocks: got 13; allowed: 0 to 12"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(section: dict[str, Any], frames: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_model(ModelConfig(video=VideoTowerConfig(**section)), [("frames", frames)])
    assert "\n" not in str(caught.value)


def test_an_unknown_tower_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(UserError, match="model.video.tower: got 'tim'.*allowed: .*space_time, timm, torchvision_video"):
        config_from_mapping({"model": {"video": {"tower": "tim"}}})


def test_a_curriculum_on_a_tower_that_cannot_grow_is_refused_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {video: {tower: torchvision_video, size: mvit_v2_s}}\n"
        "data: {sources: [{path: nowhere.jsonl}]}\n"
        "curriculum: {stages: [{frames: 1, steps: 1}, {frames: 16, steps: 1}]}\n"
        f"run_folder: {tmp_path / 'run'}\n"
    )
    for arguments in ([], ["--print-config"]):
        assert main(["train", "--config", str(tmp_path / "config.yaml"), *arguments]) == 2
        captured = capsys.readouterr()
        expected = "error: curriculum.stages[0].frames: got 1; allowed: exactly 16, which torchvision_video "
        assert captured.err.startswith(expected) and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "run").exists()


def test_recomputed_blocks_change_neither_values_nor_names() -> None:
    plain = TimmFrames("vit_tiny_patch16_224", resolution=SIDE)
    recomputed = TimmFrames("vit_tiny_patch16_224", resolution=SIDE, checkpointed_blocks=3)
    recomputed.load_state_dict(plain.state_dict())
    copied = copy.deepcopy(recomputed)
    video = clip(2)
    calls: list[int] = []
    recomputed.repeated_blocks()[0].attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    outputs = [tower(video) for tower in (plain, recomputed, copied)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for output in outputs:
        output.square().sum().backward()
    assert len(calls) == 2, "once forward, once more in the backward pass"
    for (name, ours), (_, theirs) in zip(recomputed.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    with pytest.raises(UserError, match="model.video.checkpointed_blocks: got 99; allowed: 0 to 12"):
        TimmFrames("vit_tiny_patch16_224", resolution=SIDE, checkpointed_blocks=99)


def test_repeated_blocks_are_the_networks_own() -> None:
    def kinds(tower: VideoTower) -> set[str]:
        return {type(block).__name__ for block in tower.repeated_blocks()}

    assert kinds(TimmFrames("resnet10t", resolution=SIDE)) == {"BasicBlock"}
    assert kinds(TorchvisionVideo("mc3_18", resolution=SIDE)) == {"BasicBlock"}
    vit = TimmFrames("vit_tiny_patch16_224", resolution=SIDE, over_time="transformer", max_frames=2, time_layers=1)
    assert len(vit.repeated_blocks()) == 12 + 1
    held = {id(part) for block in vit.repeated_blocks() for part in block.parameters()}
    assert sum(id(part) in held for part in vit.parameters()) > 0.9 * len(list(vit.parameters()))


def test_flops_are_counted_and_grow_with_the_frames() -> None:
    tower = TimmFrames("resnet10t", resolution=SIDE)
    one, four = tower.forward_flops(1), tower.forward_flops(4)
    assert one is not None and four == 4 * one
    convolution = next(part for part in tower.modules() if isinstance(part, nn.Conv2d))
    taps = convolution.weight[0].numel()
    assert one > 2 * taps * convolution.out_channels * (SIDE // convolution.stride[0]) ** 2


def test_a_local_file_starts_the_tower_and_another_model_is_refused(tmp_path: Path) -> None:
    whole = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "resnet.pth")
    section = VideoTowerConfig(tower="timm", size="resnet10t", resolution=SIDE, weights=str(tmp_path / "resnet.pth"))
    tower = TimmFrames.from_config(section, max_frames=1)
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tower.image_model.state_dict().items())
    with pytest.raises(UserError, match="model.video.weights: got .*resnet.pth', which lacks"):
        TimmFrames.from_config(replace(section, size="resnet18"), max_frames=1)
    with pytest.raises(UserError, match="model.video.weights: got .missing.pth.; allowed: none, pretrained, or"):
        TimmFrames.from_config(replace(section, weights="missing.pth"), max_frames=1)


def test_without_pretrained_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def create_model(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append(pretrained)
        return original(name, pretrained=False, **options)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    section = VideoTowerConfig(tower="timm", size="resnet10t")
    TimmFrames.from_config(section, max_frames=1)
    TimmFrames.from_architecture(TimmFrames("resnet10t").architecture(), max_frames=1)
    assert not any(asked)
    TimmFrames.from_config(replace(section, weights="pretrained"), max_frames=1)
    assert asked[-1] is True


@pytest.mark.slow
def test_s3d_equals_torchvisions_at_its_own_size() -> None:
    from torchvision.models.video import s3d

    plain = s3d().eval()
    tower = TorchvisionVideo("s3d").eval()
    tower.model.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.startswith("classifier")})
    plain.classifier = nn.Identity()
    video = torch.randn(1, 16, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(tower(video), plain(video.transpose(1, 2)), rtol=1e-4, atol=1e-5)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["resnet101", "s3d", "r3d_101"])
def test_the_backbones_of_table_a2_have_configs(name: str) -> None:
    config = load_config(ROOT / f"configs/pretrain/backbones/{name}.yaml")
    assert config.model.video.size == name and config.name == f"backbone_{name}"
    check_model(config.model, [("curriculum.stages", stage.frames) for stage in config.curriculum.stages])


def test_weights_are_as_many_as_the_paper_prints() -> None:
    rows = {(row["table"], row["row"]): row for row in parameter_counts.measure()}
    for (_, name), row in rows.items():
        rounding = 5e5 if row["table"] == "Table A.2" else 5e4  # the tables print whole millions and tenths of them
        if name == "S3D-G":
            assert row["counted"] < row["printed"] / 9, "the printed 76 million are of something else than S3D"
        else:
            assert row["counted"] == pytest.approx(row["printed"], rel=0.01, abs=rounding), name
    assert rows["Table A.2", "ResNet-101"]["counted"] - rows["Table A.2", "ResNet-101"]["parameters"] == 1000 * 2049
    assert {table for table, _ in rows} == {"Table A.2", "Table A.3"} and len(rows) == 8
    committed = json.loads((ROOT / "benchmarks/results/parameter_counts.json").read_text(encoding="utf-8"))["rows"]
    assert committed == list(rows.values())


def test_a_frozen_tower_keeps_its_running_averages() -> None:
    tower = TimmFrames("resnet10t", resolution=SIDE).requires_grad_(False).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower(clip(2))
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    tower.requires_grad_(True).train()(clip(2))
    assert any(not torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def _average_on_a_rank(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(2)
    torch.manual_seed(rank)
    norm(torch.randn(4, 2, 3, 3) + 3 * rank)
    own = norm.running_mean.clone()
    average_running_statistics(norm)
    torch.save({"own": own, "mean": norm.running_mean, "var": norm.running_var}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_running_averages_are_the_mean_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average_on_a_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.allclose(first["own"], second["own"], atol=0.1)
    for key in ("mean", "var"):
        assert torch.equal(first[key], second[key])
    torch.testing.assert_close(first["mean"], (first["own"] + second["own"]) / 2)
