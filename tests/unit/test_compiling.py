"""torch.compile through a stage change with videos and pictures: the same numbers, few graphs, no storm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_fast.config.schema import ModelConfig, TextTowerConfig, VideoTowerConfig
from frozen_fast.models import DualEncoder, build_dual_encoder
from frozen_fast.models.clip.clip_captions import ClipCaptions
from frozen_fast.models.clip.clip_frames import ClipFrames
from frozen_fast.models.clip.clip_towers import CLIP_SIZES
from frozen_fast.models.clip2video.clip2video_model import Clip2Video
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.training import compiling
from support.towers import make_text_tower

GRAPHS_PER_SHAPE = 3  # first block, those between, last block


def build(tower: Path, attention: str) -> DualEncoder:
    torch.manual_seed(0)
    model = build_dual_encoder(
        ModelConfig(
            video=VideoTowerConfig(size="nano_patch16_64", attention=attention),
            text=TextTowerConfig(name=str(tower), max_tokens=40),
            embedding_width=16,
        ),
        max_frames=4,
        first_frames=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    return model.eval()  # no dropout; compiled as in training


def embeddings(model: DualEncoder, batch: int, frames: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    video = torch.randn(batch, frames, 3, 64, 64, generator=generator)
    ids = torch.randint(5, 40, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    text, clips, _ = model(video, {"input_ids": ids, "attention_mask": mask})
    video_BD, text_BD = clips["embedding"], text["embedding"]
    (video_BD.square().sum() + text_BD.square().sum()).backward()
    return video_BD.detach(), text_BD.detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "clip2video"])
def test_clip_models_compile_to_the_same_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP4Clip and CLIP2Video, with masks: one graph for all caption lengths, three per shape of a stack of blocks."""
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "cache"))
    models: list[RetrievalModel] = []
    for _ in range(2):
        torch.manual_seed(0)
        size = CLIP_SIZES["tiny"]
        towers = (ClipFrames(size, over_time="transformer", max_frames=6), ClipCaptions(size))
        models.append(Clip2Video(size) if name == "clip2video" else DualEncoder(*towers, embedding_width=0))
    compiled, plain = models
    compiling.compile_towers(compiled, backend="aot_eager")
    compiling.begin_stage(compiled, {6: 2}, device=torch.device("cpu"), precision="fp32", compiled=True)
    started = compiling.compiled_graphs()
    graphs = []
    for tokens in (5, 9, 7):
        torch.manual_seed(tokens)
        ids = torch.randint(1, 1000, (2, tokens))
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        video = torch.randn(2, 6, 3, 32, 32)
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        clips = {"video": video, "frame_mask": mask} if name == "clip2video" else video
        ours, theirs = (model.pair_similarities(*model(clips, text)[:2]) for model in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for sim in (ours, theirs):
            sim.square().sum().backward()
        graphs.append(compiling.compiled_graphs() - started)
    assert graphs[0] > 0 and graphs[1] == graphs[2], "another caption length compiles nothing anew after the second"
    for (key, ours), (_, theirs) in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.slow
def test_caption_lengths_compile_nothing_anew_and_a_stage_change_no_more_than_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "cache"))
    tower = make_text_tower(tmp_path / "tower", layers=1)
    plain, compiled = build(tower, "auto"), build(tower, "auto")
    compiling.compile_towers(compiled, backend="aot_eager")
    for frames in (1, 4):
        for model in (plain, compiled):
            model.expand_frames(frames, "zero")
        shapes = {1: 6, frames: 4}
        compiling.begin_stage(compiled, shapes, device=torch.device("cpu"), precision="fp32", compiled=True)
        started = compiling.compiled_graphs()
        assert set(compiled.video_model.blocks[0].timeattn.backend_at.values()) <= {"sdpa", "cpu_c"}
        seen = []
        for number, tokens in enumerate((5, 7, 9, 12, 31, 6)):
            here = (1, frames)[number % 2]
            pairs = zip(
                embeddings(compiled, shapes[here], here, tokens),
                embeddings(plain, shapes[here], here, tokens),
                strict=True,
            )
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            seen.append(compiling.compiled_graphs() - started)
        assert seen[-1] == seen[1] == GRAPHS_PER_SHAPE * len(shapes) + 1  # the text tower's is one for all lengths
    gradients = zip(compiled.named_parameters(), plain.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in gradients:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    started = compiling.compiled_graphs()
    with compiling.eager():  # evaluation: a batch size that no stage has
        embeddings(compiled, 3, 2, 17)
    assert compiling.compiled_graphs() == started
