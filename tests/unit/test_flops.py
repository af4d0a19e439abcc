"""FLOPs: the figures of the base model, and PyTorch's own counter on small towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DistilBertConfig, T5Config

from frozen_fast.config.video_sizes import VIDEO_SIZES, VideoSize
from frozen_fast.models.counted_flops import counted_flops
from frozen_fast.models.text.text_shape import TextShape
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.models.video.space_time_flops import embedding_flops, space_time_flops
from frozen_fast.profiling.flops import clip_flops
from support.towers import make_text_tower

DISTILBERT = TextShape.from_config(DistilBertConfig())
SIZE = VideoSize(resolution=48, patch=16, width=24, depth=3, heads=2)


@pytest.mark.parametrize(("frames", "executed", "nominal"), [(1, 140, 147), (4, 533, 562), (8, 1058, 1116)])
def test_base_model_with_32_text_tokens(frames: int, executed: float, nominal: float) -> None:
    base = VIDEO_SIZES["base_patch16_224"]
    sides = {"text": DISTILBERT.forward_flops(32), "widths": (768, 768), "global_batch_size": 96}
    full = clip_flops(space_time_flops(base, frames), **sides)
    assert full.training / 1e9 == pytest.approx(nominal, rel=0.005)
    assert full.training == 3 * (full.video + full.text + full.loss)
    patches = embedding_flops(base, frames)
    done = clip_flops(space_time_flops(base, frames, executed=True), of_pixels=patches, **sides)
    assert done.training / 1e9 == pytest.approx(executed, rel=0.005)
    assert done.training == 3 * done.forward - patches, "pixels need no gradient"


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_video_tower_against_pytorchs_counter(frames: int, executed: bool, skip: bool) -> None:
    tower = SpaceTimeTransformer(
        SIZE, 4, attention="reference", full_last_block=not executed, skip_time_attention_at_one_frame=skip
    )
    clip = torch.randn(2, frames, 3, SIZE.resolution, SIZE.resolution)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = tower(clip)
    forward = counter.get_total_flops()
    expected = 2 * space_time_flops(SIZE, frames, executed=executed, skip_time_attention_at_one_frame=skip)
    assert tower.pixel_flops(frames) == embedding_flops(SIZE, frames)
    assert 2 * tower.forward_flops(frames) == expected
    # On a CPU the last block's CLS row is sums of elementwise products, which the counter does not see.
    unseen = 2 * 2 * 2 * (1 + frames * SIZE.patches_per_frame) * SIZE.width if executed else 0
    assert forward + unseen == expected
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Pixels need no gradient: the patch embedding has one product in the backward pass, not two.
    assert counter.get_total_flops() == pytest.approx(2 * expected - 2 * embedding_flops(SIZE, frames), rel=0.005)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_text_tower_against_pytorchs_counter(kind: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(make_text_tower(tmp_path, kind), attn_implementation="eager").eval()
    ids = torch.ones(3, 11, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    shape = TextShape.from_config(model.config, pooler=kind == "bert")
    assert shape is not None and counter.get_total_flops() == 3 * shape.forward_flops(11)


def test_projections_and_loss_against_pytorchs_counter() -> None:
    video, text = torch.nn.Linear(SIZE.width, 8), torch.nn.Linear(DISTILBERT.width, 8)
    with FlopCounterMode(display=False) as counter:
        both = video(torch.randn(4, SIZE.width)), text(torch.randn(4, DISTILBERT.width))
    flops = clip_flops(1e6, 2e6, widths=(SIZE.width, DISTILBERT.width), global_batch_size=4, embedding_width=8)
    assert counter.get_total_flops() == 4 * (flops.video + flops.text - 3e6)
    with FlopCounterMode(display=False) as counter:
        both[0] @ both[1].T
    assert counter.get_total_flops() == 4 * flops.loss


def test_what_is_skipped_is_less() -> None:
    base = VIDEO_SIZES["base_patch16_224"]
    full = space_time_flops(base, 4)
    assert 0.93 < space_time_flops(base, 4, executed=True) / full < 0.97
    assert space_time_flops(base, 1, skip_time_attention_at_one_frame=True) < 0.8 * space_time_flops(base, 1)
    assert space_time_flops(base, 4, skip_time_attention_at_one_frame=True) == full


def test_a_config_without_sizes_is_not_read() -> None:
    assert TextShape.from_config(T5Config()) is None


def test_a_module_that_cannot_be_counted_has_no_flops(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> float:
            return x.sum().item()

    assert counted_flops(Odd, (2, 3)) is None
    assert "no FLOPs and no MFU" in caplog.text
    assert counted_flops(lambda: torch.nn.Linear(3, 5), (2, 3)) == 2 * 2 * 3 * 5
