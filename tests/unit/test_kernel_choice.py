"""Attention backends are chosen once per stage; another backend, device, dtype or number of frames is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from frozen_fast.config.video_sizes import VideoSize
from frozen_fast.models.clip.clip_frames import ClipFrames
from frozen_fast.models.clip.clip_towers import CLIP_SIZES
from frozen_fast.models.video import blocks
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.video_tower import VideoTower
from frozen_kernels import resolve_backend
from frozen_kernels.attention import api, selection

SIZE = VideoSize(resolution=32, patch=16, width=32, depth=2, heads=2)
CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The backends that the space-time blocks ask divided_attention for; `auto` chooses sdpa."""
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path))
    selection.forget_choices()
    monkeypatch.setattr(selection, "_measure", lambda *_: ({"cpu_c": 2.0, "sdpa": 1.0}, {}))
    names: list[str] = []
    real = blocks.divided_attention

    def divided_attention(qkv: Tensor, frames: int, axis: str, *, backend: str) -> Tensor:
        names.append(backend)
        return real(qkv, frames, axis, backend=backend)

    monkeypatch.setattr(blocks, "divided_attention", divided_attention)
    return names


def run(tower: VideoTower, frames: int, dtype: torch.dtype = torch.float32) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        tower(torch.randn(3, frames, 3, 32, 32))


def test_a_stage_settles_its_frames_and_dtype_and_no_others(asked: list[str]) -> None:
    tower = SpaceTimeTransformer(SIZE, 4)
    tower.choose_kernels({2: 3}, CPU, torch.float32)
    cases = len(selection.chosen_backends())
    run(tower, 2)
    assert set(asked) == {"sdpa"} and len(selection.chosen_backends()) == cases == 2, "an axis each"
    for frames, dtype in ((3, torch.float32), (2, torch.bfloat16)):
        asked.clear()
        run(tower, frames, dtype)
        assert set(asked) == {"auto"}
    assert len(selection.chosen_backends()) == cases + 4
    tower.choose_kernels({2: 3}, torch.device("meta"), torch.float32)  # another device's choice is its own
    asked.clear()
    run(tower, 2)
    assert set(asked) == {"sdpa"}


def test_another_backend_counts_at_once(asked: list[str]) -> None:
    tower = SpaceTimeTransformer(SIZE, 4)
    tower.choose_kernels({2: 3}, CPU, torch.float32)
    for block in tower.blocks:
        block.attn.backend = block.timeattn.backend = "reference"  # type: ignore[union-attr]
    run(tower, 2)
    assert set(asked) == {"reference"}


def test_clip_settles_its_sequences_too(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tower = ClipFrames(CLIP_SIZES["tiny"])
    tower.choose_kernels({2: 3}, CPU, torch.float32)
    monkeypatch.setattr(api, "choose_backend", lambda *_, **__: pytest.fail("chosen again"))
    run(tower, 2)
    with pytest.raises(pytest.fail.Exception, match="chosen again"):
        run(tower, 2, torch.bfloat16)


def test_a_shape_is_looked_up_without_describing_the_machine_again(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = torch.randn(2, 5, 3, 2, 16)
    assert resolve_backend("auto", qkv, 2, "time") == "sdpa"
    monkeypatch.setattr(selection, "_device_name", lambda _: pytest.fail("described again"))
    assert resolve_backend("auto", qkv, 2, "time") == "sdpa"
    with pytest.raises(pytest.fail.Exception, match="described again"):
        resolve_backend("auto", qkv, 1, "time")


def test_deterministic_algorithms_settle_the_deterministic_backend() -> None:
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 2, 16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert resolve_backend("auto", qkv, 2, "time") == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
