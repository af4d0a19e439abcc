"""FLOPs: the figures of the base model, and PyTorch's own counter on small towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DistilBertConfig

from frozen_fast.config.video_sizes import VIDEO_SIZES, VideoSize
from frozen_fast.errors import UserError
from frozen_fast.models.video.space_time import SpaceTimeTransformer
from frozen_fast.profiling.flops import TextShape, clip_flops, text_forward_flops, video_forward_flops
from support.towers import make_text_tower

DISTILBERT = TextShape.from_config(DistilBertConfig())
SIZE = VideoSize(resolution=48, patch=16, width=24, depth=3, heads=2)


@pytest.mark.parametrize(("frames", "gflop"), [(1, 147), (4, 562), (8, 1116)])
def test_base_model_with_32_text_tokens(frames: int, gflop: float) -> None:
    flops = clip_flops(VIDEO_SIZES["base_patch16_224"], DISTILBERT, frames=frames, text_tokens=32, global_batch_size=96)
    assert flops.training / 1e9 == pytest.approx(gflop, rel=0.02)
    assert flops.training == 3 * (flops.video + flops.text + flops.loss)


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
    expected = 2 * video_forward_flops(
        SIZE, frames, embedding_width=0, executed=executed, skip_time_attention_at_one_frame=skip
    )
    # On a CPU the last block's CLS row is sums of elementwise products, which the counter does not see.
    unseen = 2 * 2 * 2 * (1 + frames * SIZE.patches_per_frame) * SIZE.width if executed else 0
    assert forward + unseen == expected
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Pixels need no gradient: the patch embedding has one product in the backward pass, not two.
    embedding = 2 * 2 * frames * SIZE.patches_per_frame * 3 * SIZE.patch**2 * SIZE.width
    assert counter.get_total_flops() == pytest.approx(2 * expected - embedding, rel=0.005)


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_text_tower_against_pytorchs_counter(kind: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(make_text_tower(tmp_path, kind), attn_implementation="eager").eval()
    ids = torch.ones(3, 11, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    shape = TextShape.from_config(model.config, pooler=kind == "bert")
    assert counter.get_total_flops() == 3 * text_forward_flops(shape, 11, embedding_width=0)


def test_projections_and_loss_against_pytorchs_counter() -> None:
    def count(width: int) -> float:
        text_part = text_forward_flops(DISTILBERT, 5, embedding_width=width)
        return video_forward_flops(SIZE, 1, embedding_width=width) + text_part

    video, text = torch.nn.Linear(SIZE.width, 8), torch.nn.Linear(DISTILBERT.width, 8)
    with FlopCounterMode(display=False) as counter:
        both = video(torch.randn(4, SIZE.width)), text(torch.randn(4, DISTILBERT.width))
    assert counter.get_total_flops() == 4 * (count(8) - count(0))
    with FlopCounterMode(display=False) as counter:
        both[0] @ both[1].T
    loss = clip_flops(SIZE, DISTILBERT, frames=1, text_tokens=5, global_batch_size=4, embedding_width=8).loss
    assert counter.get_total_flops() == 4 * loss


def test_what_is_skipped_is_less() -> None:
    base = VIDEO_SIZES["base_patch16_224"]
    full = video_forward_flops(base, 4)
    assert 0.93 < video_forward_flops(base, 4, executed=True) / full < 0.97
    assert video_forward_flops(base, 1, skip_time_attention_at_one_frame=True) < 0.8 * video_forward_flops(base, 1)
    assert video_forward_flops(base, 4, skip_time_attention_at_one_frame=True) == full


def test_a_config_without_sizes_is_refused() -> None:
    class Empty:
        def to_dict(self) -> dict:
            return {}

    with pytest.raises(UserError, match="model.text: got a Empty"):
        TextShape.from_config(Empty())
